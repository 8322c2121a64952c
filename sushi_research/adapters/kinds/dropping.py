"""Rank dropout and module dropout: parts of an adapter that are left out while training, for each sample by itself.

The random numbers are drawn by torch on the device, as those of its dropout are: a recorded step draws new ones in each replay.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

Tensor = torch.Tensor


def drop_channels(x: Tensor, probability: float, axis: int) -> Tensor:
    """`x` without some of its channels, which lie along `axis`, in each sample [B, ...]; the others are divided by the probability
    to stay, as in kohya's `rank_dropout`."""
    shape = [1] * x.ndim
    shape[0], shape[axis] = x.shape[0], x.shape[axis]
    return x * F.dropout(x.new_ones(shape), probability)


def drop_samples(x: Tensor, probability: float) -> Tensor:
    """`x` with zeros for some of its samples [B, ...]. The others stay as they are, as in kohya's `module_dropout`."""
    stays = torch.rand((x.shape[0], *(1,) * (x.ndim - 1)), device=x.device) >= probability
    return x * stays.to(x.dtype)


class LowRankDropping:
    """The forward pass of a LoRA layer of peft with rank and module dropout: a `LoraVariant` by its methods."""

    def __init__(self, rank_dropout: float, module_dropout: float) -> None:
        self._rank_dropout, self._module_dropout = rank_dropout, module_dropout

    def forward(self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        """The layer's output: `result`, that of the base layer for `x`, and what the adapter adds."""
        low = module.lora_A[active_adapter](module.lora_dropout[active_adapter](x))
        if module.training and self._rank_dropout:
            low = drop_channels(low, self._rank_dropout, channel_axis(module))
        added = module.lora_B[active_adapter](low) * module.scaling[active_adapter]
        if module.training and self._module_dropout:
            added = drop_samples(added, self._module_dropout)
        return result + added

    def supports_lora_conversion(self) -> bool:
        """Whether the trained matrices are a plain LoRA."""
        return True


def channel_axis(layer: Any) -> int:
    """The axis of the channels in a layer's inputs and outputs."""
    return 1 if isinstance(layer.get_base_layer(), torch.nn.Conv2d) else -1
