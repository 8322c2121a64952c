"""DoRA: a LoRA with a trained magnitude for each input of the layer (arXiv 2402.09353, with the norms of the other axis).

    W' = (W + s B A) diag(m / n),    n: the norms of the columns of W + s B A, through which no gradient flows (section 4.3)

so that y = W (c x) + s B A (c x) with c = m / n: the input is scaled, and all else is the LoRA layer's. The paper normalises each
output. Files with a magnitude for each input are read as they were trained by ComfyUI, Forge and InvokeAI; those of the paper's
axis are not (docs/kinds.md).

What is trained is the change d of the magnitude as a share of it, m = n0 (1 + d), where n0 are the norms of W. It starts at zero,
where c is one exactly. c and its product with the input are computed in fp32: in bf16, 1 + d would be one until d is 0.4 %.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sushi_research.models.storage import weight_of

ADAPTER = "default"
# Below the square of any norm that fp32 has a use for; so that an input without weights has no 0 / 0.
_LEAST = 1e-30
# Of the square of a norm, which is left at least: below it rounding decides, and may give a negative square.
_SHARE = 1e-8


def add_magnitude(layer: Any) -> None:
    """Makes a LoRA layer of peft a DoRA: adds the parameter `magnitude` [in], fp32 zeros, and scales the layer's input."""
    weight = weight_of(layer.get_base_layer())
    squares = weight.detach().flatten(2 if weight.ndim > 2 else 1).float().square()
    squares = squares.sum((0, 2)) if squares.ndim > 2 else squares.sum(0)
    layer.register_buffer("squared_norms", squares.clamp_min_(_LEAST), persistent=False)
    layer.magnitude = nn.Parameter(torch.zeros_like(squares))
    layer.lora_factor, layer.given = 1.0, None
    layer.register_forward_pre_hook(_scale_input)
    layer.register_forward_hook(_scale_change)


def has_magnitude(layer: Any) -> bool:
    """Whether `add_magnitude` was called."""
    return hasattr(layer, "squared_norms")


def set_magnitude(layer: Any, magnitude: torch.Tensor) -> None:
    """Sets the parameter from magnitudes as files have them."""
    device = layer.squared_norms.device
    share = magnitude.to(device).double().flatten() / layer.squared_norms.double().sqrt() - 1
    layer.magnitude = nn.Parameter(share.float())


def magnitude_of(layer: Any, share: torch.Tensor) -> torch.Tensor:
    """The magnitude that files have, fp32 on the device of `share`: [1, in], or [1, in, 1, 1] of a convolution."""
    norms = layer.squared_norms.to(share.device).sqrt()
    kernel = (1, 1) if isinstance(layer.get_base_layer(), nn.Conv2d) else ()
    return (norms * (1 + share.float())).reshape(1, -1, *kernel)


def input_factors(layer: Any) -> torch.Tensor:
    """c [in], fp32."""
    with torch.no_grad():
        squares = torch.maximum(_changed_squares(layer), layer.squared_norms * _SHARE)
        ratio = (layer.squared_norms / squares).sqrt()
    return (1 + layer.magnitude.float()) * ratio


def _changed_squares(layer: Any) -> torch.Tensor:
    """The squared norms of the columns of W + s B A, without making that matrix: |W|^2 + 2 s (B'W) A + s^2 (B'B A) A."""
    down, up = layer.lora_A[ADAPTER].weight.flatten(1), layer.lora_B[ADAPTER].weight.flatten(1)
    scale = layer.scaling[ADAPTER]
    weight = weight_of(layer.get_base_layer()).flatten(1)
    mixed = (up.T @ weight.to(up.dtype)).float()  # [rank, in * k * k]
    down, up = down.float(), up.float()
    change = ((2 * scale * mixed + scale**2 * ((up.T @ up) @ down)) * down).sum(0)
    inputs = len(layer.squared_norms)
    return layer.squared_norms + change.view(inputs, -1).sum(1)


def _scale_input(layer: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """A forward pre-hook of the layer."""
    if layer.disable_adapters:
        return None
    x, *others = arguments
    layer.given = x if layer.lora_factor != 1 else None
    factors = input_factors(layer)
    if isinstance(layer.get_base_layer(), nn.Conv2d):
        factors = factors[:, None, None]
    return ((x * factors).to(x.dtype), *others)


def _scale_change(layer: Any, arguments: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
    """A forward hook of the layer: at a LoRA scale s, the weight is W + s (W' - W), as programs have it (`lora_scale.scaled`)."""
    if layer.disable_adapters or layer.lora_factor == 1:
        return None
    base, layer.given = layer.get_base_layer()(layer.given), None
    return base + layer.lora_factor * (output - base)
