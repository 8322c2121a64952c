"""Applies the adapters of a model at a multiple of their scale."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator

from torch import nn

# Model -> the factor of the files that adapters/applying.py has put on it.
_FACTORS: weakref.WeakKeyDictionary[nn.Module, float] = weakref.WeakKeyDictionary()


def factor_of(model: nn.Module) -> float:
    """The product of the factors of the contexts of `scaled` in which the model is."""
    return _FACTORS.get(model, 1.0)


@contextlib.contextmanager
def scaled(model: nn.Module, factor: float) -> Iterator[None]:
    """Context in which every adapter of `model` has `factor` times its scale: peft's layers, those of kinds that peft does not
    have (with a `lora_factor`), and files on it (`applying`).

    The scale is alpha / rank times the set LoRA scale. A base without an adapter is not changed.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    modules = list(model.modules()) if factor != 1 else []
    own = {module: module.lora_factor for module in modules if hasattr(module, "lora_factor")}
    layers = [module for module in modules if isinstance(module, BaseTunerLayer) and module not in own]
    before, outer = [dict(layer.scaling) for layer in layers], factor_of(model)
    for layer, scales in zip(layers, before, strict=True):
        layer.scaling.update({name: factor * scale for name, scale in scales.items()})
    for module, value in own.items():
        module.lora_factor = value * factor  # type: ignore[assignment]
    _FACTORS[model] = outer * factor
    try:
        yield
    finally:
        _FACTORS[model] = outer
        for module, value in own.items():
            module.lora_factor = value
        for layer, scales in zip(layers, before, strict=True):
            layer.scaling.update(scales)
