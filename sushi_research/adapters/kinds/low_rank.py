"""LoRA: a pair of low-rank matrices next to each chosen layer (arXiv 2106.09685). The layers are peft's.

    y = W x + (alpha / rank) * B A x,    A: [rank, in] starts random, B: [out, rank] starts at zero

The tensors of a layer are `lora_A.weight` and `lora_B.weight`, and of a DoRA `magnitude` too (dora.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from sushi_research.adapters.entries import Entry, LowRank
from sushi_research.adapters.kinds import dora
from sushi_research.adapters.kinds.dropping import LowRankDropping
from sushi_research.adapters.kinds.initial import initial_down
from sushi_research.adapters.settings import AdapterSettings, LayerSettings
from sushi_research.adapters.tensor_names import module_name

ADAPTER = "default"


def attach(
    component: Any,
    settings: AdapterSettings,
    layers: Mapping[str, LayerSettings],
    *,
    endings: Sequence[str],
    left_out: Sequence[str],
    name: str,
    start: Mapping[str, LowRank] | None,
) -> None:
    """Freezes the component and adds peft's layers to the `layers`, which the `endings` name if one takes off those `left_out`.

    The matrices are fp32, on the device of their layer.
    """
    from peft import LoraConfig, inject_adapter_in_model

    rank, alpha = settings.rank, settings.alpha
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=settings.dropout, target_modules=list(endings))
    config.rank_pattern |= _patterns({path: each.rank for path, each in layers.items() if each.rank != rank})
    config.alpha_pattern |= _patterns({path: each.alpha for path, each in layers.items() if each.alpha != alpha})
    if left_out:
        config.exclude_modules = "|".join(map(re.escape, left_out))
    # peft freezes all other parameters. It also initialises A from the global generator: those values are replaced below, and
    # the generator's state is restored.
    with torch.random.fork_rng(devices=[]):
        inject_adapter_in_model(config, component, ADAPTER)
    for path in layers:
        layer = component.get_submodule(path)
        if settings.kind == "dora":
            dora.add_magnitude(layer)
        if settings.rank_dropout or settings.module_dropout:
            layer.lora_variant[ADAPTER] = LowRankDropping(settings.rank_dropout, settings.module_dropout)
        down, up = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
        device = layer.get_base_layer().weight.device
        if device.type == "meta":
            continue  # a model without numbers has no initial values
        # On a bf16 UNet peft creates bf16 matrices; the initial values must be fp32.
        if start is None:
            first = initial_down(settings.seed, module_name(name, path), tuple(down.weight.shape), settings.init)
            second = torch.zeros(up.weight.shape)
        else:
            first, second = start[path].down.float(), start[path].up.float()
            if start[path].magnitude is not None:
                dora.set_magnitude(layer, start[path].magnitude)
        down.weight, up.weight = nn.Parameter(first.to(device)), nn.Parameter(second.to(device))


def parameters(layer: Any) -> dict[str, nn.Parameter]:
    """The trained tensors of a layer by part, A before B."""
    found = {"lora_A.weight": layer.lora_A[ADAPTER].weight, "lora_B.weight": layer.lora_B[ADAPTER].weight}
    return found | ({"magnitude": layer.magnitude} if dora.has_magnitude(layer) else {})


def entry(layer: Any, name: str, tensors: Mapping[str, torch.Tensor]) -> Entry:
    """What the layer holds, with these `tensors` by part."""
    magnitude = dora.magnitude_of(layer, tensors["magnitude"]) if "magnitude" in tensors else None
    down, up = tensors["lora_A.weight"], tensors["lora_B.weight"]
    return LowRank(name, down, up, layer.scaling[ADAPTER], None, magnitude)


def _patterns(values: Mapping[str, Any]) -> dict[str, Any]:
    """The value of each module path, as patterns for peft: one for each value, because peft tries all patterns for each module."""
    paths: dict[Any, list[str]] = {}
    for path, value in values.items():
        paths.setdefault(value, []).append(re.escape(path))
    return {f"^(?:{'|'.join(group)})": value for value, group in paths.items()}
