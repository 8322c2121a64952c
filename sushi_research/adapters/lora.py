"""The adapter that is trained: layers with trainable tensors in place of chosen layers of a frozen UNet or text encoder.

What a layer adds is its kind (`kinds/`): two low-rank matrices (LoRA), also with magnitudes (DoRA), or other factors (LoHa, LoKr).
A module's path is its path in the component without the adapter, for example `mid_block.attentions.0.proj_in`. The names of its
tensors are in tensor_names.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from sushi_research.adapters.entries import Entry, LowRank
from sushi_research.adapters.kinds import low_rank
from sushi_research.adapters.kinds.added import AddedKind, AddedWeight, Dropouts, weight_shape
from sushi_research.adapters.kinds.loha import LOHA
from sushi_research.adapters.kinds.lokr import LOKR
from sushi_research.adapters.kinds.low_rank import ADAPTER as ADAPTER
from sushi_research.adapters.settings import AdapterSettings, LayerSettings
from sushi_research.adapters.targets import resolve_targets, target_layers
from sushi_research.adapters.tensor_names import NEW_TOKENS, TensorName, module_name, starts_at_zero
from sushi_research.errors import UserError
from sushi_research.models.new_tokens import rows_of

_ADDED: dict[str, AddedKind] = {"loha": LOHA, "lokr": LOKR}
# Component -> path of a layer in it -> what the adapter holds for it.
Trained = dict[str, dict[str, Entry]]


def attach(
    component: nn.Module,
    settings: AdapterSettings,
    *,
    name: str = "unet",
    start: Mapping[str, Entry] | None = None,
) -> None:
    """Freezes a component and adds the trainable adapter: fp32 tensors on the device of their layer.

    `name` is unet, text_encoder or text_encoder_2. Initial values depend only on the seed, the module and the tensor. `start` are
    the entries to begin with, by path, each with its own rank and alpha, in place of initial values; they are of the settings'
    kind. UserError for a target that matches no layer, or one that cannot have an adapter, and if no layer is left.
    """
    endings = resolve_targets(settings.targets)
    chosen = layers_of(component, settings, name, start)
    if settings.kind in _ADDED:
        component.requires_grad_(False)
        for path, layer in chosen.items():
            _replace(component, path, _added_layer(component.get_submodule(path), path, layer, settings, name, start))
    else:
        left_out = [path for path in target_layers(component, endings, name) if path not in chosen]
        pairs = None if start is None else {path: _pair(entry) for path, entry in start.items()}
        low_rank.attach(component, settings, chosen, endings=endings, left_out=left_out, name=name, start=pairs)
    modules = adapter_modules(component)
    assert modules.keys() == chosen.keys(), "the targets are not the modules that have an adapter"


def layers_of(
    component: nn.Module, settings: AdapterSettings, name: str = "unet", start: Mapping[str, Entry] | None = None
) -> dict[str, LayerSettings]:
    """Path -> settings of each layer of a component that gets an adapter, in the component's order. UserError as for `attach`."""
    targets = target_layers(component, resolve_targets(settings.targets), name)
    if start is not None:
        assert targets.keys() == start.keys(), "the targets are not the modules of the file"
        return {
            path: LayerSettings(start[path].rank or 1, start[path].scale * (start[path].rank or 1)) for path in targets
        }
    found = {path: settings.of_layer(module_name(name, path), layer) for path, layer in targets.items()}
    chosen = {path: layer for path, layer in found.items() if layer is not None}
    if not chosen and name != "unet":
        raise UserError(
            f"lora.overrides give rank 0 to all modules of the {name} that text_encoders.targets names: remove one of them, or "
            "train without that encoder (text_encoders.train false, or of SDXL a text_encoders.lr of 0 for one of two)."
        )
    if not chosen:
        raise UserError(
            "lora.overrides give rank 0 to all modules of lora.targets, and a run adapts the UNet: remove one of them, or give "
            "lr_factor 0 to train only text encoders or new tokens."
        )
    return chosen


def adapter_modules(component: nn.Module) -> dict[str, Any]:
    """Path -> layer with an adapter, in the order of the component's modules: peft's LoRA layers, or `AddedWeight`."""
    from peft.tuners.lora import LoraLayer

    return {path: module for path, module in component.named_modules() if isinstance(module, LoraLayer | AddedWeight)}


def adapter_parameters(components: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """The adapters' tensors by name, in the order of the components and of their modules; of a pair A is before B. Then the vectors
    of new tokens."""
    found = {
        str(TensorName(name, path, part)): parameter
        for name, component in components.items()
        for path, layer in adapter_modules(component).items()
        for part, parameter in _parameters(layer).items()
    }
    for name, component in components.items():
        if name != "unet" and (rows := rows_of(component)) is not None:
            found |= {
                str(TensorName(name, NEW_TOKENS, token)): own for token, own in zip(rows.names, rows.added, strict=True)
            }
    return found


@torch.no_grad()
def trained_entries(components: Mapping[str, nn.Module], state: Mapping[str, torch.Tensor] | None = None) -> Trained:
    """What the adapters hold for each layer, as a file does: with these tensors by name, or with those that the layers have."""
    state = adapter_parameters(components) if state is None else state
    found: Trained = {}
    for name, component in components.items():
        for path, layer in adapter_modules(component).items():
            tensors = {part: state[str(TensorName(name, path, part))].detach() for part in _parameters(layer)}
            found.setdefault(name, {})[path] = entry_of(layer, module_name(name, path), tensors)
    return found


def entry_of(layer: Any, name: str, tensors: Mapping[str, torch.Tensor]) -> Entry:
    """What one layer holds, with these tensors by part. `name` is only for messages."""
    if isinstance(layer, AddedWeight):
        return layer.kind.entry(name, tensors, layer.scale)
    return low_rank.entry(layer, name, tensors)


@contextlib.contextmanager
def without_adapter(*components: nn.Module) -> Iterator[None]:
    """Context in which the components are those of the base, bit for bit. On exit their adapters are active again, with their
    gradients kept."""
    layers = [layer for component in components for layer in adapter_modules(component).values()]
    # peft switches the training of its matrices off with the layer, and all of them on again.
    trained = [(each, each.requires_grad) for layer in layers for each in _parameters(layer).values()]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, is_trained in trained:
            parameter.requires_grad_(is_trained)


def count_parameters(components: Mapping[str, nn.Module]) -> int:
    """Number of parameters of the adapters. Works on the meta device too."""
    return sum(parameter.numel() for parameter in adapter_parameters(components).values())


def is_zero(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> bool:
    """Whether everything that a new adapter has at zero still is in `dtype`, so that the adapter changes nothing.

    `tensors` are as `adapter_parameters` names them.
    """
    return not any(tensor.to(dtype).any() for name, tensor in tensors.items() if starts_at_zero(name))


def _parameters(layer: Any) -> dict[str, nn.Parameter]:
    return layer.parameters_by_part() if isinstance(layer, AddedWeight) else low_rank.parameters(layer)


def _pair(entry: Entry) -> LowRank:
    assert isinstance(entry, LowRank)
    return entry


def _added_layer(
    base: nn.Module,
    path: str,
    of_layer: LayerSettings,
    settings: AdapterSettings,
    name: str,
    start: Mapping[str, Entry] | None,
) -> AddedWeight:
    """The layer in place of `base`."""
    assert isinstance(base, nn.Linear | nn.Conv2d)
    kind, shape, device = _ADDED[settings.kind], weight_shape(base), base.weight.device
    if start is not None:
        values = kind.factors(start[path], shape)
    else:
        shapes = kind.shapes(shape, of_layer.rank, settings.lokr_factor)
        module = module_name(name, path)
        if device.type == "meta":  # a model without numbers has no initial values
            values = {part: torch.empty(size, device="meta") for part, size in shapes.items()}
        else:
            values = {part: kind.initial(settings.seed, module, part, size) for part, size in shapes.items()}
    # A product of whole matrices has no rank, and every program then takes a scale of 1.
    ranked = any(part.endswith("_b") for part in values)
    scale = of_layer.alpha / of_layer.rank if ranked or start is not None else 1.0
    layer = AddedWeight(base, kind, {part: each.to(device) for part, each in values.items()}, scale)
    layer.dropouts = Dropouts(settings.dropout, settings.rank_dropout, settings.module_dropout)
    return layer.train(base.training)


def _replace(component: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, own = path.rpartition(".")
    setattr(component.get_submodule(parent), own, layer)
