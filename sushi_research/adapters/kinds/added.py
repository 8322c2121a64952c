"""A layer with a trained change of its weight that is no pair of matrices: the frozen layer, and beside it some factors.

peft has layers for LoHa and LoKr too. These here replace them because a recorded step needs random masks that are drawn on the
device (peft draws on the CPU and decides in Python), because peft makes the whole change of the weight and autograd then keeps it
(as many numbers as the base has), and because peft takes the shape of a weight from its tensor, which a base in 8 or 4 bits has
not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from sushi_research.adapters.entries import Entry
from sushi_research.adapters.kinds.dropping import channel_axis, drop_channels, drop_samples

Tensor = torch.Tensor
Shape = tuple[int, ...]


@dataclass(frozen=True)
class AddedKind:
    """What differs between the kinds of such layers.

    `shapes(weight shape, rank, factor)` are those of a new adapter's factors by part, `initial(seed, name, part, shape)` their
    values; `output(layer, x)` is what is added to the layer's output, without the scale; `entry(name, tensors, scale)` is the
    normal form, `factors(entry, weight shape)` are the factors of one.
    """

    shapes: Callable[[Shape, int, int], dict[str, Shape]]
    initial: Callable[[int, str, str, Shape], Tensor]
    output: Callable[[AddedWeight, Tensor], Tensor]
    entry: Callable[[str, Mapping[str, Tensor], float], Entry]
    factors: Callable[[Any, Shape], dict[str, Tensor]]


@dataclass(frozen=True)
class Dropouts:
    """The three probabilities of the config."""

    inputs: float = 0.0
    rank: float = 0.0
    module: float = 0.0


class AddedWeight(nn.Module):
    """A frozen linear layer or convolution, and factors of a change of its weight. The factors are attributes named by part."""

    def __init__(
        self, base_layer: nn.Linear | nn.Conv2d, kind: AddedKind, factors: Mapping[str, Tensor], scale: float
    ) -> None:
        super().__init__()
        self.base_layer, self.kind, self.scale = base_layer, kind, scale
        self.parts = tuple(factors)
        for part, values in factors.items():
            self.register_parameter(part, nn.Parameter(values))
        self.dropouts = Dropouts()
        self.is_enabled = True
        self.lora_factor = 1.0  # sampling/lora_scale.py

    def get_base_layer(self) -> nn.Linear | nn.Conv2d:
        """The frozen layer, as peft's layers call it."""
        return self.base_layer

    def enable_adapters(self, enabled: bool) -> None:
        """Whether the change is added, as peft's layers call it."""
        self.is_enabled = enabled

    def parameters_by_part(self) -> dict[str, nn.Parameter]:
        """The factors by part."""
        return {part: getattr(self, part) for part in self.parts}

    def forward(self, x: Tensor) -> Tensor:
        """The output of the frozen layer with the changed weight."""
        result = self.base_layer(x)
        if not self.is_enabled:
            return result
        drops = self.dropouts if self.training else Dropouts()
        added = self.kind.output(self, F.dropout(x, drops.inputs) if drops.inputs else x)
        if self.scale * self.lora_factor != 1:
            added = added * (self.scale * self.lora_factor)
        if drops.rank:
            added = drop_channels(added, drops.rank, channel_axis(self))
        if drops.module:
            added = drop_samples(added, drops.module)
        return result + added


def weight_shape(layer: nn.Module) -> Shape:
    """The shape of the weight of a linear layer or convolution, which may be held in another one."""
    if isinstance(layer, nn.Conv2d):
        return (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)
    assert isinstance(layer, nn.Linear)
    return (layer.out_features, layer.in_features)


def convolution_settings(layer: nn.Module) -> dict[str, Any]:
    """The arguments of a convolution besides its tensors."""
    return {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")}
