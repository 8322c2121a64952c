"""Matches the entries of an adapter file with the layers of a model, by the names and shapes of its layers.

Every entry must have a layer of its own, which its matrices fit: so whatever an entry is computed to has the size of the layer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from sushi_research.adapters.entries import Difference, Entry, Hadamard, Kronecker, LowRank, Tensor, title_of
from sushi_research.adapters.formats import names
from sushi_research.adapters.formats.spellings import belongs, spellings, underscored
from sushi_research.adapters.reading import Adapter
from sushi_research.errors import UserError
from sushi_research.models import ARCHITECTURES, Architecture
from sushi_research.models.components import TITLES

# Component of the pipeline -> path of a layer in it -> the entry that the file has for it.
Matches = dict[str, dict[str, Entry]]
Shape = tuple[int, ...]


class Layer(NamedTuple):
    """A layer that an adapter can change: the shape of its weight, [out, in], [out, in, k, k] or of a norm [channels]."""

    shape: Shape
    has_bias: bool


# Component -> path -> layer.
Layers = Mapping[str, Mapping[str, Layer]]


def match_modules(adapter: Adapter, pipeline: Any) -> Matches:
    """The layer of the pipeline for each entry of the file.

    UserError unless every entry has a layer of its own, with matrices of the right shapes.
    """
    components = {component: getattr(pipeline, component, None) for component in set(names.COMPONENTS.values())}
    return match_components(adapter, architecture_of(pipeline), components)


def match_components(
    adapter: Adapter, architecture: Architecture, components: Mapping[str, nn.Module | None]
) -> Matches:
    """`match_modules` with the components by their names in the pipeline; they may have no weights (the meta device)."""
    layers = {component: layers_of(module) for component, module in components.items()}
    return match_layers(adapter, architecture, layers, components["unet"].config.layers_per_block)


def match_layers(adapter: Adapter, architecture: Architecture, layers: Layers, layers_per_block: int) -> Matches:
    """`match_modules` with the layers alone. `layers_per_block` is the UNet's config's."""
    path = adapter.path
    tables = {component: spellings(component, own, layers_per_block) for component, own in layers.items()}
    found = {entry.name: _place(entry.name, architecture, tables) for entry in adapter.entries}
    strange = [name for name, place in found.items() if place is None]
    lacking = [_lacking(name, architecture, layers) for name in strange]
    if strange and all(lacking):
        raise UserError(
            f"{path} changes the {TITLES[lacking[0]]} ({strange[0]:.200}), which this {architecture.label} base has not: give "
            "a base that has one."
        )
    if strange:
        raise UserError(
            f"{path}: {len(strange):,} of {len(found):,} modules not found in this {architecture.label} base "
            f"({strange[0]:.200}{' and others' if len(strange) > 1 else ''}): give an adapter for this architecture."
        )
    matches: Matches = {}
    for entry in adapter.entries:
        component, layer = found[entry.name]  # type: ignore[misc]
        taken = matches.setdefault(component, {})
        if layer in taken:
            raise UserError(
                f"{path} holds {taken[layer].name} and {entry.name}, which are the same module of the base: "
                "take a copy that holds it once."
            )
        taken[layer] = _shaped(entry, layers[component][layer].shape)
        _require_fitting(path, taken[layer], layers[component][layer])
    return matches


def architecture_of(pipeline: Any) -> Architecture:
    """The architecture of a pipeline of diffusers."""
    from diffusers import loaders

    return next(
        each for each in ARCHITECTURES.values() if isinstance(pipeline, getattr(loaders, each.formats().ADAPTER_LOADER))
    )


def layers_of(module: nn.Module | None) -> dict[str, Layer]:
    """Path -> layer of a component that an adapter can change; one that has a trained adapter counts under its own path."""
    found: dict[str, Layer] = {}
    for path, layer in () if module is None else module.named_modules():
        if hasattr(layer, "get_base_layer"):
            layer = layer.get_base_layer()
        if (shape := shape_of(layer)) and not re.search(r"\.(base_layer|lora_[A-Za-z_]+)\b", path):
            found[path] = Layer(shape, getattr(layer, "bias", None) is not None)
    return found


def shape_of(layer: nn.Module) -> Shape | None:
    """The shape of a layer's weight; None for a module that adapters cannot change.

    It does not look at the weight, which may be stored in another shape (models/storage.py).
    """
    if isinstance(layer, nn.Conv2d):
        return (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)
    if isinstance(layer, nn.Linear):
        return (layer.out_features, layer.in_features)
    if isinstance(layer, nn.GroupNorm) and layer.affine:
        return (layer.num_channels,)
    if isinstance(layer, nn.LayerNorm) and layer.elementwise_affine and len(layer.normalized_shape) == 1:
        return tuple(layer.normalized_shape)
    return None


def _place(name: str, architecture: Architecture, tables: Mapping[str, Mapping[str, str]]) -> tuple[str, str] | None:
    """(component, path of the layer) of a module's name in a file."""
    parts = names.split(name)
    assert parts is not None, "the reader refuses other names"
    component, prefix, rest = parts
    if not belongs(architecture, prefix):
        return None
    layer = tables.get(component, {}).get(underscored(rest))
    return None if layer is None else (component, layer)


def _lacking(name: str, architecture: Architecture, layers: Layers) -> str | None:
    """The component of a module's name, if the architecture has it and this base does not."""
    parts = names.split(name)
    assert parts is not None, "the reader refuses other names"
    component, prefix, _ = parts
    is_known = component in architecture.formats().TEXT_ENCODERS and belongs(architecture, prefix)
    return component if is_known and not layers.get(component) else None


def _shaped(entry: Entry, shape: Shape) -> Entry:
    """The entry with its tensors in the shapes that are for this layer, where only ones at their ends differ.

    Trainers write the matrices of a linear layer and of a 1x1 convolution as [a, b] or [a, b, 1, 1], whichever the layer is
    (SD1.5's proj_in is a convolution, SDXL's a linear layer), and the other programs read either. So it is with a magnitude.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in vars(entry).items():
        if not isinstance(tensor, Tensor) or tensor.ndim < 2 or any(size > 1 for size in tensor.shape[2:]):
            continue
        if _has_ones_of(entry, name, shape) and tensor.ndim != len(shape):
            found[name] = tensor.reshape(*tensor.shape[:2], *(1,) * (len(shape) - 2))
    return replace(entry, **found) if found else entry


def _has_ones_of(entry: Entry, name: str, shape: Shape) -> bool:
    """Whether a tensor of an entry has the ones at its end that the shape of this layer has, or none for a linear layer."""
    if name == "magnitude":
        return len(shape) > 1
    if len(shape) < 2 or shape[2:] not in ((), (1, 1)):
        return False
    if isinstance(entry, LowRank):
        return entry.mid is None and name in ("down", "up")
    if isinstance(entry, Difference):
        return name == "weight"
    # These are matrices for a convolution too, but some have a kernel, which a linear layer has not.
    return len(shape) == 2 and name not in ("t1", "t2")


def _require_fitting(path: Path, entry: Entry, layer: Layer) -> None:
    """UserError unless the shapes of the entry's tensors are those of a change of this layer."""
    if isinstance(entry, LowRank) and len(layer.shape) > 1:
        _require_pair(path, entry, layer.shape)
    elif not _FITS[type(entry)](entry, layer.shape):
        tensors = [value for value in vars(entry).values() if isinstance(value, Tensor)]
        raise UserError(
            f"{path}: the matrices of {entry.name} ({title_of(entry)}) are "
            f"{', '.join(str(list(each.shape)) for each in tensors)}, and the weight "
            f"that they change is {list(layer.shape)} in this base: give an adapter for this base."
        )
    if entry.bias is not None and not (layer.has_bias and tuple(entry.bias.shape) == layer.shape[:1]):
        has = f"one of {layer.shape[0]} numbers" if layer.has_bias else "none"
        raise UserError(
            f"{path} changes the bias of {entry.name} by {entry.bias.numel()} numbers, and this base has {has} there: give an "
            "adapter for this base."
        )
    magnitude = None if isinstance(entry, Difference) else entry.magnitude
    if magnitude is not None and not _magnitude_fits(tuple(magnitude.shape), layer.shape):
        raise UserError(
            f"{path}: the magnitude of {entry.name} is {list(magnitude.shape)}, and this base needs {layer.shape[0]} numbers (of "
            f"the outputs) or {[1, layer.shape[1]]} (of the inputs) there: give an adapter for this base."
        )


def _require_pair(path: Path, entry: LowRank, shape: Shape) -> None:
    kernel = (1, 1) if len(shape) > 2 else ()
    into = shape[1:] if entry.mid is None else (shape[1], *kernel)
    expected = ((entry.rank, *into), (shape[0], entry.rank, *kernel))
    found = (tuple(entry.down.shape), tuple(entry.up.shape))
    core = None if entry.mid is None else tuple(entry.mid.shape)
    if found != expected or core not in (None, (entry.rank, entry.rank, *shape[2:])):
        raise UserError(
            f"{path}: the matrices of {entry.name} are {list(found[0])} and {list(found[1])}, and this base needs "
            f"{list(expected[0])} and {list(expected[1])} there: give an adapter for this base."
        )


def _pair_fits(entry: LowRank, shape: Shape) -> bool:
    return False  # of a norm, which has no matrix


def _hadamard_fits(entry: Hadamard, shape: Shape) -> bool:
    if len(shape) == 1:
        return False
    for a, b, core in ((entry.w1_a, entry.w1_b, entry.t1), (entry.w2_a, entry.w2_b, entry.t2)):
        if core is not None:
            fits = (a.shape[1], b.shape[1], *core.shape[2:]) == shape
        else:
            inner = tuple(b.shape[1:])
            fits = a.shape[0] == shape[0] and (inner == shape[1:] or inner == (math.prod(shape[1:]),))
        if not fits:
            return False
    return True


def _kronecker_fits(entry: Kronecker, shape: Shape) -> bool:
    if len(shape) == 1:
        return False
    first = entry.w1.shape if entry.w1 is not None else (entry.w1_a.shape[0], entry.w1_b.shape[1])  # type: ignore[union-attr]
    kernel = shape[2:]
    if entry.w2 is not None:
        second = tuple(entry.w2.shape)
    elif entry.t2 is not None:
        second = (entry.w2_a.shape[1], entry.w2_b.shape[1], *entry.t2.shape[2:])  # type: ignore[union-attr]
    else:
        second = (entry.w2_a.shape[0], *entry.w2_b.shape[1:])  # type: ignore[union-attr]
    if len(second) == 2:  # [c, d * k * k]
        size = math.prod(kernel)
        if second[1] % size:
            return False
        second = (second[0], second[1] // size, *kernel)
    return (first[0] * second[0], first[1] * second[1], *second[2:]) == shape


def _difference_fits(entry: Difference, shape: Shape) -> bool:
    return entry.weight is None or tuple(entry.weight.shape) == shape


_FITS: dict[type, Any] = {
    LowRank: _pair_fits,
    Hadamard: _hadamard_fits,
    Kronecker: _kronecker_fits,
    Difference: _difference_fits,
}


def _magnitude_fits(found: Shape, shape: Shape) -> bool:
    if len(shape) == 1:
        return False
    ones = (1,) * (len(shape) - 2)
    return found in ((shape[0],), (shape[0], 1, *ones), (1, shape[1], *ones))
