"""The difference of two models as an adapter: for each layer the best low-rank approximation of what was added to its weight."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from sushi_research.adapters.entries import Entry
from sushi_research.adapters.tools.base_weights import BaseWeights, Weights
from sushi_research.adapters.tools.located import Entries
from sushi_research.adapters.tools.low_rank import Limit, cut, spectrum
from sushi_research.errors import UserError
from sushi_research.models import ARCHITECTURES
from sushi_research.models.components import TITLES
from sushi_research.progress import progress


@dataclass
class Extracted:
    """`entries` by component and layer; `left_out` is what they do not cover: kind of parameter -> (number, squared norm)."""

    entries: Entries
    left_out: dict[str, tuple[int, float]] = field(default_factory=dict)


def difference(base: Weights, tuned: Weights, component: str, parameter: str) -> torch.Tensor:
    """What was added to a parameter, fp32."""
    return tuned.get(component, parameter).float() - base.get(component, parameter).float()


def extract(base: Weights, tuned: Weights, limit: Limit, components: list[str]) -> Extracted:
    """The adapter that turns `base` into `tuned`, of the linear and convolutional layers that differ.

    Layers for which the limit gives a rank of 0 are left out. UserError if no layer differs.
    """
    found: dict[str, dict[str, Entry]] = {}
    left: dict[str, tuple[int, float]] = {}
    places = [(name, parameter) for name in components for parameter in base.base.components[name].places]
    for component, parameter in progress(places, description="extracting", unit="tensor"):
        change = difference(base, tuned, component, parameter)
        if not change.any():
            continue
        shape = tuple(change.shape)
        path, _, end = parameter.rpartition(".")
        layer = base.base.components[component].model.get_submodule(path)
        kind = _kind(layer, end)
        if kind in _COVERED and limit.most(shape) > 0:
            values = spectrum(change.flatten(1))
            rank = limit.rank_of(values.values, shape)
            found.setdefault(component, {})[path] = cut(path, values, rank, shape)
        else:
            number, squares = left.get(kind, (0, 0.0))
            left[kind] = number + 1, squares + float(change.double().square().sum())
    if not found:
        raise UserError(
            f"{base.base.source} and {tuned.base.source} differ in no layer that an adapter can change: give the base that the "
            "model was trained from, and a model that was trained."
        )
    return Extracted(found, left)


_COVERED = ("linear layers", "convolutions")


def _kind(layer: nn.Module, end: str) -> str:
    """What a parameter is, for the list of what is left out."""
    if end == "weight" and isinstance(layer, nn.Linear | nn.Conv2d):
        return _COVERED[isinstance(layer, nn.Conv2d)]
    return "embeddings" if isinstance(layer, nn.Embedding) else "biases and norms"


def components_of(base: BaseWeights, tuned: BaseWeights, text: bool) -> list[str]:
    """The components to compare: the UNet, and with `text` the text encoders that both have.

    UserError unless both are of one architecture with equal sizes.
    """
    if base.architecture != tuned.architecture:
        labels = [ARCHITECTURES[each.architecture].label for each in (base, tuned)]
        raise UserError(
            f"{base.source} is an {labels[0]} base and {tuned.source} an {labels[1]} base: give two models of one kind."
        )
    names = [name for name in base.components if name in tuned.components and (text or name == "unet")]
    for name in names:
        shapes = [dict(_shapes(each, name)) for each in (base, tuned)]
        if different := sorted(
            path for path in shapes[0].keys() | shapes[1].keys() if shapes[0].get(path) != shapes[1].get(path)
        ):
            raise UserError(
                f"{base.source} and {tuned.source} have different layers in the {TITLES[name]} ({different[0]}): give two models "
                "of one kind."
            )
    return names


def _shapes(base: BaseWeights, name: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    return ((path, tuple(parameter.shape)) for path, parameter in base.components[name].model.named_parameters())
