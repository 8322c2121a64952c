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
    """Context in which every adapter of `model` has `factor` times its scale: trained layers, and files on it (`applying`).

    The scale is alpha / rank times the set LoRA scale. A base without an adapter is not changed.
    """
    layers = [module for module in model.modules() if hasattr(module, "get_base_layer")] if factor != 1 else []
    of_peft = [(layer, dict(layer.scaling)) for layer in layers if hasattr(layer, "scaling")]
    of_others = [(layer, layer.scale) for layer in layers if not hasattr(layer, "scaling")]  # kinds/added.py
    outer = factor_of(model)
    for layer, scales in of_peft:
        layer.scaling.update({name: factor * scale for name, scale in scales.items()})
    for layer, scale in of_others:
        layer.scale = factor * scale
    _FACTORS[model] = outer * factor
    try:
        yield
    finally:
        _FACTORS[model] = outer
        for layer, scales in of_peft:
            layer.scaling.update(scales)
        for layer, scale in of_others:
            layer.scale = scale
