"""Applies the LoRA layers of a model at a multiple of their scale."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def scaled(model: nn.Module, factor: float) -> Iterator[None]:
    """Context in which every LoRA layer of peft in `model` has `factor` times its scale, alpha / rank times the set LoRA scale.

    Without such layers, as in a base, nothing is changed.
    """
    from peft.tuners.lora import LoraLayer

    layers = [module for module in model.modules() if isinstance(module, LoraLayer)] if factor != 1 else []
    before = [dict(layer.scaling) for layer in layers]
    for layer, scales in zip(layers, before, strict=True):
        layer.scaling.update({name: factor * scale for name, scale in scales.items()})
    try:
        yield
    finally:
        for layer, scales in zip(layers, before, strict=True):
            layer.scaling.update(scales)
