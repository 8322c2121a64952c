"""LoKr: the change of a weight is a Kronecker product (LyCORIS, arXiv 2309.14859).

    W' = W + s kron(w1, w2),    w1: [a, b], w2: [c, d] or [c, d, k, k], of a layer with a * c outputs and b * d inputs

a * c and b * d are the sizes as LyCORIS splits them (`factorization`). w2 is the product of two matrices of the rank, or whole
where that is not larger; then s is 1. Initial values are those of LyCORIS: w1 and w2_a Kaiming uniform, w2_b or a whole w2 zero.

The product is never made: with the input as [b, d], w2 is applied to each row and w1 to each column.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from sushi_research.adapters.entries import Kronecker
from sushi_research.adapters.kinds.added import AddedKind, AddedWeight, Shape, convolution_settings
from sushi_research.adapters.kinds.initial import kaiming_uniform

Tensor = torch.Tensor


def factorization(size: int, factor: int) -> tuple[int, int]:
    """Two numbers, the smaller first, whose product is `size`: one is `factor` if it divides the size; otherwise the smaller is as
    large as possible, but at most `factor` (-1: no limit). Equals `factorization` of LyCORIS."""
    if factor > 0 and size % factor == 0:
        return min(factor, size // factor), max(factor, size // factor)
    most = math.isqrt(size) if factor < 0 else min(factor, math.isqrt(size))
    small = next(each for each in range(most, 0, -1) if size % each == 0)
    return small, size // small


def shapes(weight: Shape, rank: int, factor: int) -> dict[str, Shape]:
    """The shapes of the factors."""
    (a, c), (b, d) = factorization(weight[0], factor), factorization(weight[1], factor)
    kernel = weight[2:]
    if rank >= max(c, d) / 2:
        return {"lokr_w1": (a, b), "lokr_w2": (c, d, *kernel)}
    return {"lokr_w1": (a, b), "lokr_w2_a": (c, rank), "lokr_w2_b": (rank, d * math.prod(kernel))}


def initial(seed: int, name: str, part: str, shape: Shape) -> Tensor:
    """The initial values of a factor of the module `name`."""
    if part in ("lokr_w2", "lokr_w2_b"):
        return torch.zeros(shape)
    return kaiming_uniform(seed, f"{name}.{part}", shape)


def output(layer: AddedWeight, x: Tensor) -> Tensor:
    """What the change adds to the layer's output, without the scale."""
    parts = layer.parameters_by_part()
    w1 = parts["lokr_w1"] if "lokr_w1" in parts else parts["lokr_w1_a"] @ parts["lokr_w1_b"]
    b = w1.shape[1]
    w2 = parts["lokr_w2"] if "lokr_w2" in parts else parts["lokr_w2_a"] @ parts["lokr_w2_b"]
    base = layer.base_layer
    if isinstance(base, nn.Conv2d):
        assert base.groups == 1, "LoKr is for convolutions of all channels"
        w2 = w2.view(w2.shape[0], -1, *base.kernel_size)
        y = F.conv2d(x.reshape(-1, x.shape[1] // b, *x.shape[2:]), w2, **convolution_settings(base))
        samples, size = x.shape[0], y.shape[2:]
        return (w1 @ y.reshape(samples, b, -1)).view(samples, -1, *size)
    y = F.linear(x.unflatten(-1, (b, -1)), w2)  # [..., b, c]
    return F.linear(y.transpose(-1, -2), w1).transpose(-1, -2).flatten(-2)  # [..., a, c] -> [..., a * c]


def entry(name: str, tensors: Mapping[str, Tensor], scale: float) -> Kronecker:
    """The normal form of the factors."""
    return Kronecker(name, **{part.removeprefix("lokr_"): values for part, values in tensors.items()}, scale=scale)


def factors(found: Kronecker, weight: Shape) -> dict[str, Tensor]:
    """The factors of an entry without Tucker decomposition, fp32."""
    parts = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")
    values = {part: getattr(found, part).float() for part in parts if getattr(found, part) is not None}
    for part in values.keys() - {"w2"}:  # OneTrainer gives those of convolutions the dimensions of a kernel
        values[part] = values[part].flatten(1)
    if "w2" in values and len(weight) == 4:
        values["w2"] = values["w2"].reshape(len(values["w2"]), -1, *weight[2:])  # or [c, d * k * k]
    return {f"lokr_{part}": each for part, each in values.items()}


LOKR = AddedKind(shapes, initial, output, entry, factors)
