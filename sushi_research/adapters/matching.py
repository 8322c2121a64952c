"""Matches the pairs of an adapter file with the layers of a base, and checks what a loaded adapter adds to each layer."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sushi_research.adapters.kohya_format import kohya_unet_names
from sushi_research.adapters.reading import COMPONENTS, Adapter, Pair, component_of
from sushi_research.errors import UserError
from sushi_research.models import ARCHITECTURES, Architecture

# Component of the pipeline -> path of a layer in it -> the pair that the file has for it.
Matches = dict[str, dict[str, Pair]]


def match_modules(adapter: Adapter, pipeline: Any) -> Matches:
    """The layer of the pipeline for each pair of the file.

    UserError unless every pair has a layer of its own, with matrices of the right shapes.
    """
    components = {component: getattr(pipeline, component, None) for component in set(COMPONENTS.values())}
    return match_components(adapter, _architecture(pipeline), components)


def match_components(
    adapter: Adapter, architecture: Architecture, components: Mapping[str, nn.Module | None]
) -> Matches:
    """`match_modules` with the components by their names in the pipeline; they may have no weights (the meta device)."""
    path = adapter.path
    layers = {component: _layers(module) for component, module in components.items()}
    per_block = components["unet"].config.layers_per_block
    names = {component: _names(architecture, component, layers[component], per_block) for component in layers}
    found = {pair.name: names[component_of(pair.name)].get(pair.name) for pair in adapter.pairs}
    strange = [name for name, layer in found.items() if layer is None]
    if strange:
        raise UserError(
            f"{path}: {len(strange):,} of {len(found):,} modules not found in this {architecture.label} base "
            f"({strange[0]:.200}{' and others' if len(strange) > 1 else ''}): give an adapter for this architecture."
        )
    matches: Matches = {}
    for pair in adapter.pairs:
        component = component_of(pair.name)
        layer = found[pair.name]
        taken = matches.setdefault(component, {})
        if layer in taken:
            raise UserError(
                f"{path} holds {taken[layer].name} and {pair.name}, which are the same module of the base: "
                "take a copy that holds it once."
            )
        taken[layer] = pair
        _require_shapes(path, pair, layers[component][layer])
    return matches


def require_loaded(pipeline: Any, name: str, matches: Matches, path: str | Path) -> None:
    """UserError unless the loaded adapter `name` adds to every layer what its file says, and to no other layer.

    Compares the matrices bit for bit in the dtype of the layer, and the scales. The adapter must be at a LoRA scale of 1.
    """
    for component in set(COMPONENTS.values()):
        loaded = {where: layer for where, layer in _adapted(getattr(pipeline, component, None)) if name in layer.lora_A}
        expected = matches.get(component, {})
        if different := sorted(loaded.keys() ^ expected.keys()):
            fault = "changes a layer that the file does not name" if different[0] in loaded else "does not load a layer"
            raise UserError(f"{path}: diffusers {fault} ({different[0]} of the {component}): this file cannot be used.")
        for where, pair in expected.items():
            layer = loaded[where]
            scale = layer.scaling[name]
            if not math.isclose(scale, pair.scale, rel_tol=1e-6):  # the libraries may compute it in fp32
                raise UserError(
                    f"{path} has alpha / rank = {pair.alpha:g} / {pair.rank} in {pair.name}, and diffusers loads it with the "
                    f"scale {scale:g}: use a file with one rank and one alpha for all modules."
                )
            for own, stored in ((layer.lora_A[name].weight, pair.down), (layer.lora_B[name].weight, pair.up)):
                if not torch.equal(own.detach().cpu(), stored.to(own.dtype)) or layer.lora_variant.get(name):
                    raise UserError(
                        f"{path}: diffusers loads other matrices for {pair.name} than the file holds: "
                        "this file cannot be used."
                    )


def _architecture(pipeline: Any) -> Architecture:
    from diffusers import loaders

    return next(
        each for each in ARCHITECTURES.values() if isinstance(pipeline, getattr(loaders, each.formats().ADAPTER_LOADER))
    )


def _layers(module: nn.Module | None) -> dict[str, nn.Module]:
    """Path -> linear or convolutional layer of a component; a layer that has an adapter counts under its own path."""
    from peft.tuners.lora import LoraLayer

    layers = {} if module is None else dict(module.named_modules())
    layers = {
        path: layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
        for path, layer in layers.items()
        if not re.search(r"\.(base_layer|lora_[A-Za-z_]+)\b", path)
    }
    return {path: layer for path, layer in layers.items() if isinstance(layer, nn.Linear | nn.Conv2d)}


def _adapted(module: nn.Module | None) -> Iterable[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    layers = () if module is None else module.named_modules()
    return ((path, layer) for path, layer in layers if isinstance(layer, LoraLayer))


def _names(architecture: Architecture, component: str, paths: Iterable[str], layers_per_block: int) -> dict[str, str]:
    """Every name that a file can have for the layers of a component -> the layer's path."""
    paths = list(paths)
    names = {}
    # kohya numbers the text encoders only where there are two, so a number tells the architectures apart.
    strange = ("lora_te_",) if len(architecture.formats().TEXT_ENCODERS) > 1 else ("lora_te1_", "lora_te2_")
    for prefix in (each for each, owner in COMPONENTS.items() if owner == component and each not in strange):
        for path in paths:
            # transformers 5 dropped `text_model.` from the paths of CLIPTextModel, but not from those with a projection.
            short = path.removeprefix("text_model.")
            for spelling in (path, short, f"text_model.{short}") if component != "unet" else (path,):
                name = prefix + (spelling if prefix.endswith(".") else spelling.replace(".", "_"))
                names[name] = path
    if component == "unet":
        kohya = kohya_unet_names(architecture.name, paths, layers_per_block)
        names |= {name: path for path, name in kohya.items()}
    return names


def _require_shapes(path: Path, pair: Pair, layer: nn.Linear | nn.Conv2d) -> None:
    # Not the shape of its weight, which may be stored in another one.
    if isinstance(layer, nn.Conv2d):
        out, into = layer.out_channels, [layer.in_channels // layer.groups, *layer.kernel_size]
    else:
        out, into = layer.out_features, [layer.in_features]
    kernel = (1, 1) if isinstance(layer, nn.Conv2d) else ()
    expected = ((pair.rank, *into), (out, pair.rank, *kernel))
    found = (tuple(pair.down.shape), tuple(pair.up.shape))
    if found != expected:
        raise UserError(
            f"{path}: the matrices of {pair.name} are {list(found[0])} and {list(found[1])}, and this base needs "
            f"{list(expected[0])} and {list(expected[1])} there: give an adapter for this base."
        )
