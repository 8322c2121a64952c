"""Applies the entries of adapter files to a model: each layer gives its own output plus what the file's entry adds to it.

    output + LoRA scale * (what the entry adds at a scale of 1)

Nothing of the model is changed or replaced: forward hooks add to the outputs. A plain low-rank entry is computed as peft does, down
and then up, in the dtype of the model. Everything else is computed from the change of the weight, which is made again from the
file's matrices at each forward pass, so that no layer's whole change stays in memory. As in ComfyUI a LoRA scale s means the weight
W + s * (W' - W), also for a DoRA.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sushi_research.adapters.entries import Difference, Entry, LowRank, changed_weight, delta
from sushi_research.adapters.matching import Matches, shape_of
from sushi_research.errors import UserError
from sushi_research.models.new_tokens import NewTokens
from sushi_research.models.storage import weight_of
from sushi_research.sampling.lora_scale import factor_of

# The input of a layer and a scale -> what is added to the layer's output.
Addition = Callable[[Tensor, float], Tensor]


class Applied:
    """An adapter file on the components of a pipeline. It changes nothing until it is activated.

    Several on one model add up. `components` are those of `matches`, by their names in the pipeline.
    """

    def __init__(
        self, path: Path, components: Mapping[str, nn.Module], matches: Matches, tokens: Sequence[NewTokens] = ()
    ) -> None:
        """UserError for values that the dtype of a component cannot hold. New tokens have no scale: they are there, or not."""
        self._scale = 0.0
        self._tokens = tokens
        self._handles: list[Any] = []
        additions = [
            (components[component], layer, _addition(path, entry, layer, components[component].dtype))
            for component, entries in matches.items()
            for layer, entry in _layers_of(components[component], entries)
        ]
        for component, layer, addition in additions:
            self._handles.append(layer.register_forward_hook(self._hook(component, addition), with_kwargs=True))

    def activate(self, scale: float = 1.0) -> None:
        """From now on the file is applied at this LoRA scale."""
        self._scale = scale
        for each in self._tokens:
            if scale:
                each.activate()
            else:
                each.deactivate()

    def deactivate(self) -> None:
        """From now on the model is as without the file, bit for bit."""
        self.activate(0.0)

    def remove(self) -> None:
        """Takes the file off the model."""
        self.deactivate()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, component: nn.Module, addition: Addition) -> Callable[..., Tensor]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            scale = self._scale * factor_of(component)
            if scale == 0.0:
                return output
            given = args[0] if args else next(iter(kwargs.values()))
            return output + addition(given, scale)

        return hook


def _layers_of(component: nn.Module, entries: Mapping[str, Entry]) -> list[tuple[nn.Module, Entry]]:
    found = []
    for path, entry in entries.items():
        layer = component.get_submodule(path)
        found.append((layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer, entry))
    return found


def _addition(path: Path, entry: Entry, layer: nn.Module, dtype: torch.dtype) -> Addition:
    """What the entry adds to the output of its layer, which is computed in `dtype`."""
    device = layer.weight.device
    apply = _operation(layer)
    bias = None if entry.bias is None else _cast(entry.bias, dtype, entry.name, path).to(device)
    if isinstance(entry, LowRank) and entry.magnitude is None:
        return _low_rank_addition(path, entry, layer, dtype, bias)
    if isinstance(entry, Difference):
        change = None if entry.weight is None else _cast(entry.weight, dtype, entry.name, path).to(device)
        if change is None:
            assert bias is not None
            return lambda x, scale: _as_output(bias, x, layer) * scale
        return lambda x, scale: apply(x.to(dtype), change, bias) * scale
    own = _on(entry, device, path)
    shape = shape_of(layer)
    assert shape is not None

    def add(x: Tensor, scale: float) -> Tensor:
        with torch.no_grad():
            if own.magnitude is None:  # type: ignore[union-attr]
                change = delta(own, shape)
            else:
                weight = weight_of(layer).float()
                change = changed_weight(own, weight) - weight
        return apply(x, change.to(x.dtype), bias) * scale

    return add


def _low_rank_addition(
    path: Path, entry: LowRank, layer: nn.Module, dtype: torch.dtype, bias: Tensor | None
) -> Addition:
    matrices = [each for each in (entry.down, entry.mid, entry.up) if each is not None]
    down, *others = (_cast(each, dtype, entry.name, path).to(layer.weight.device) for each in matrices)
    up, mid = others[-1], others[0] if entry.mid is not None else None
    factor, of_layer = entry.scale, _operation(layer)

    def add(x: Tensor, scale: float) -> Tensor:
        x = x.to(down.dtype)
        if down.ndim == 2:
            # torch makes one product of all rows where a matrix requires gradients, as peft's do, and else not always: a rounding.
            rows = F.linear(F.linear(x.flatten(0, -2), down), up).unflatten(0, x.shape[:-1]) * (scale * factor)
            return rows if bias is None else rows + bias * scale
        inner = of_layer(x, down, None) if mid is None else of_layer(F.conv2d(x, down), mid, None)
        found = F.conv2d(inner, up) * (scale * factor)
        return found if bias is None else found + _as_output(bias, found, layer) * scale

    return add


def _operation(layer: nn.Module) -> Callable[[Tensor, Tensor | None, Tensor | None], Tensor]:
    """(input, weight, bias) -> what a layer like this one gives with this weight and bias; None is none, and for a norm zeros."""
    if isinstance(layer, nn.Linear):
        return F.linear
    if isinstance(layer, nn.Conv2d):
        assert layer.padding_mode == "zeros", layer.padding_mode
        where = (layer.stride, layer.padding, layer.dilation, layer.groups)
        return lambda x, weight, bias: F.conv2d(x, weight, bias, *where)
    if isinstance(layer, nn.GroupNorm):
        return lambda x, weight, bias: F.group_norm(x, layer.num_groups, weight, bias, layer.eps)
    assert isinstance(layer, nn.LayerNorm), type(layer)
    return lambda x, weight, bias: F.layer_norm(x, layer.normalized_shape, weight, bias, layer.eps)


def _as_output(bias: Tensor, output: Tensor, layer: nn.Module) -> Tensor:
    """The bias in the shape in which it is added to an output: channels are the second axis of pictures, else the last."""
    has_channels = isinstance(layer, nn.Conv2d | nn.GroupNorm)
    return bias.reshape(-1, *[1] * (output.ndim - 2)) if has_channels else bias


def _on(entry: Entry, device: torch.device, path: Path) -> Entry:
    """The entry with its tensors on the device, in a dtype in which they can be multiplied there."""
    fields = dict(vars(entry))
    for name, value in fields.items():
        if isinstance(value, Tensor):
            plain = value.dtype in (torch.float32, torch.float16, torch.bfloat16)
            fields[name] = (value if plain else _cast(value, torch.float32, entry.name, path)).to(device)
    return type(entry)(**fields)


def _cast(tensor: Tensor, dtype: torch.dtype, name: str, path: Path) -> Tensor:
    """The tensor in the dtype of the component; UserError if a value overflows (fp16's maximum is 65,504)."""
    cast = tensor.to(dtype)
    if not torch.isfinite(cast).all():
        advice = "set precision to bf16 or fp32" if dtype == torch.float16 else "take another copy of the adapter"
        raise UserError(
            f"{path} has values up to {tensor.double().abs().max():.3g} in {name}, which "
            f"{str(dtype).removeprefix('torch.')} cannot hold: {advice}."
        )
    return cast
