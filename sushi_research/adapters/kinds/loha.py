"""LoHa: the change of a weight is the elementwise product of two low-rank matrices (FedPara, arXiv 2108.06098; LyCORIS).

    W' = W + s (w1_a w1_b) * (w2_a w2_b),    w1_a, w2_a: [out, rank], w1_b, w2_b: [rank, in * k * k]

Its rank is up to rank squared. Initial values are those of LyCORIS: w1_a normal with deviation 0.1, w1_b and w2_b with 1, w2_a
zero. The change is made in the forward pass and once more in the backward pass; autograd keeps only the factors and the input.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from sushi_research.adapters.entries import Hadamard
from sushi_research.adapters.kinds.added import AddedKind, AddedWeight, Shape, convolution_settings, weight_shape
from sushi_research.adapters.kinds.initial import normal

Tensor = torch.Tensor
PARTS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_DEVIATIONS = {"hada_w1_a": 0.1, "hada_w1_b": 1.0, "hada_w2_b": 1.0}


def shapes(weight: Shape, rank: int, factor: int) -> dict[str, Shape]:
    """The shapes of the factors; LoHa has no `factor`."""
    out, into = (weight[0], rank), (rank, torch.Size(weight[1:]).numel())
    return dict(zip(PARTS, (out, into, out, into), strict=True))


def initial(seed: int, name: str, part: str, shape: Shape) -> Tensor:
    """The initial values of a factor of the module `name`."""
    deviation = _DEVIATIONS.get(part)
    return torch.zeros(shape) if deviation is None else normal(seed, f"{name}.{part}", shape, deviation)


def output(layer: AddedWeight, x: Tensor) -> Tensor:
    """What the change adds to the layer's output, without the scale."""
    return _Product.apply(x, layer.base_layer, *layer.parameters_by_part().values())


def entry(name: str, tensors: Mapping[str, Tensor], scale: float) -> Hadamard:
    """The normal form of the factors."""
    return Hadamard(name, *(tensors[part] for part in PARTS), scale)


def factors(found: Hadamard, weight: Shape) -> dict[str, Tensor]:
    """The factors of an entry without Tucker decomposition, fp32."""
    return {part: getattr(found, part.removeprefix("hada_")).float().flatten(1) for part in PARTS}


class _Product(torch.autograd.Function):
    """The output of a layer whose weight is the product. `layer` gives the shape and the settings of a convolution."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Module, *parts: Tensor) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x, *parts)
        w1_a, w1_b, w2_a, w2_b = parts
        weight = ((w1_a @ w1_b) * (w2_a @ w2_b)).view(weight_shape(layer))
        if isinstance(layer, nn.Conv2d):
            return F.conv2d(x, weight, **convolution_settings(layer))
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, w1_a, w1_b, w2_a, w2_b = ctx.saved_tensors
        layer, shape = ctx.layer, weight_shape(ctx.layer)
        first, second = w1_a @ w1_b, w2_a @ w2_b
        weight, of_x = (first * second).view(shape), None
        if isinstance(layer, nn.Conv2d):
            settings = convolution_settings(layer)
            if ctx.needs_input_grad[0]:
                of_x = nn.grad.conv2d_input(x.shape, weight, gradient, **settings)
            of_weight = nn.grad.conv2d_weight(x, shape, gradient, **settings).flatten(1)
        else:
            if ctx.needs_input_grad[0]:
                of_x = gradient @ weight
            of_weight = gradient.flatten(0, -2).T @ x.flatten(0, -2)
        of_first, of_second = of_weight * second, of_weight * first
        return of_x, None, of_first @ w1_b.T, w1_a.T @ of_first, of_second @ w2_b.T, w2_a.T @ of_second


LOHA = AddedKind(shapes, initial, output, entry, factors)
