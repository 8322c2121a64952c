"""What an adapter file holds for one layer, and the change of the layer's weight that it stands for.

One form for the files of all trainers:

    LowRank      scale * up @ down, or scale * up @ mid @ down of a convolution (Tucker decomposition)    LoRA, LoCon, DoRA
    Hadamard     scale * (w1_a @ w1_b) * (w2_a @ w2_b)                                                      LoHa
    Kronecker    scale * kron(w1, w2), each a matrix or a product of two                                    LoKr
    Difference   the change itself, of weight or bias                                                       full, norms

The first three may change the layer's bias too: `bias` [out] is that change, with every scale in it.

The formulas are those of LyCORIS (github.com/KohakuBlueleaf/LyCORIS, arXiv 2309.14859), whose names the tensors have. With a
`magnitude` the layer is decomposed into direction and magnitude (DoRA, arXiv 2402.09353): the changed weight is scaled so that
its norms are `magnitude`, along the output axis ([out, 1, ...]) or the input axis ([1, in, ...]).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

Tensor = torch.Tensor


@dataclass(frozen=True)
class LowRank:
    """`down` [rank, in] and `up` [out, rank], or for a convolution [rank, in, k, k] and [out, rank, 1, 1].

    With `mid` [rank, rank, k, k], `down` is [rank, in, 1, 1]. `name` is the module's name in the file.
    """

    name: str
    down: Tensor
    up: Tensor
    scale: float = 1.0
    mid: Tensor | None = None
    magnitude: Tensor | None = None
    bias: Tensor | None = None

    @property
    def rank(self) -> int:
        """The number of rows of `down`."""
        return self.down.shape[0]

    @property
    def alpha(self) -> float:
        """The number that is divided by the rank to give the scale; of several, the one with the fewest digits."""
        product = self.scale * self.rank
        short = float(f"{product:.12g}")
        return short if short / self.rank == self.scale else product


@dataclass(frozen=True)
class Hadamard:
    """`w1_a`, `w2_a` [out, rank] and `w1_b`, `w2_b` [rank, in * k * k], or [out, rank, 1, 1] and [rank, in, k, k] (OneTrainer).

    With `t1`, `t2` [rank, rank, k, k] (Tucker decomposition), `w1_a`, `w2_a` are [rank, out] and `w1_b`, `w2_b` [rank, in].
    """

    name: str
    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    scale: float = 1.0
    t1: Tensor | None = None
    t2: Tensor | None = None
    magnitude: Tensor | None = None
    bias: Tensor | None = None

    @property
    def rank(self) -> int:
        """The rank of each of the two products."""
        return self.w1_b.shape[0]


@dataclass(frozen=True)
class Kronecker:
    """`w1` [a, b] or `w1_a @ w1_b`, and `w2` [c, d] or [c, d, k, k], or `w2_a @ w2_b`, for a layer [a * c, b * d, ...].

    With `t2` [rank, rank, k, k] (Tucker decomposition), `w2_a` is [rank, c] and `w2_b` [rank, d].
    """

    name: str
    w1: Tensor | None = None
    w1_a: Tensor | None = None
    w1_b: Tensor | None = None
    w2: Tensor | None = None
    w2_a: Tensor | None = None
    w2_b: Tensor | None = None
    t2: Tensor | None = None
    scale: float = 1.0
    magnitude: Tensor | None = None
    bias: Tensor | None = None

    @property
    def rank(self) -> int | None:
        """The rank of the products; None if both matrices are whole."""
        found = self.w2_b if self.w2_b is not None else self.w1_b
        return None if found is None else found.shape[0]


@dataclass(frozen=True)
class Difference:
    """The change of the layer's weight, of its bias, or of both."""

    name: str
    weight: Tensor | None = None
    bias: Tensor | None = None


Entry = LowRank | Hadamard | Kronecker | Difference


def title_of(entry: Entry) -> str:
    """The kind of adapter that an entry is, as trainers name it."""
    if isinstance(entry, Difference):
        return "difference"
    name = {LowRank: "LoRA", Hadamard: "LoHa", Kronecker: "LoKr"}[type(entry)]
    if isinstance(entry, LowRank) and entry.mid is not None:
        name = "LoRA with Tucker decomposition"
    if entry.bias is not None:
        name += " and bias"
    if entry.magnitude is None:
        return name
    return "DoRA" if name == "LoRA" else f"{name} with DoRA's magnitude"


def delta(entry: Entry, shape: tuple[int, ...]) -> Tensor:
    """The change of a layer's weight of this shape, fp32, without the magnitude of a DoRA (`changed_weight`).

    The shapes must fit (`matching`). Zero for a Difference of the bias alone.
    """
    if isinstance(entry, LowRank):
        return entry.scale * _low_rank(entry).reshape(shape)
    if isinstance(entry, Hadamard):
        first = _product(entry.w1_a, entry.w1_b, entry.t1)
        return entry.scale * (first * _product(entry.w2_a, entry.w2_b, entry.t2)).reshape(shape)
    if isinstance(entry, Kronecker):
        # Some files give a matrix the dimensions of a kernel.
        first = _whole(entry.w1, entry.w1_a, entry.w1_b, None).flatten(1)
        second = _whole(entry.w2, entry.w2_a, entry.w2_b, entry.t2)
        first = first.reshape(*first.shape, *(1,) * (second.ndim - first.ndim))
        return entry.scale * torch.kron(first, second.contiguous()).reshape(shape)
    return torch.zeros(shape) if entry.weight is None else entry.weight.float().reshape(shape)


def changed_weight(entry: Entry, weight: Tensor) -> Tensor:
    """The layer's weight with the adapter at a LoRA scale of 1, fp32.

    At another LoRA scale s, programs use weight + s * (changed_weight - weight), also for a DoRA.
    """
    changed = weight.float() + delta(entry, tuple(weight.shape)).to(weight.device)
    magnitude = None if isinstance(entry, Difference) else entry.magnitude
    if magnitude is None:
        return changed
    return changed * (
        magnitude.to(changed).reshape(magnitude_shape(entry, weight))
        / norms(changed, is_input_axis(entry, weight)).clamp_min(
            torch.finfo(changed.dtype).eps
        )  # rows of zeros stay zeros
    )


def norms(weight: Tensor, of_inputs: bool) -> Tensor:
    """The norm of the weights of each input [1, in, 1, ...] or of each output [out, 1, 1, ...]."""
    axis = 1 if of_inputs else 0
    return torch.linalg.vector_norm(weight, dim=[d for d in range(weight.ndim) if d != axis], keepdim=True)


def is_input_axis(entry: LowRank | Hadamard | Kronecker, weight: Tensor) -> bool:
    """Whether the magnitude is that of the inputs: its first size is then 1, and not the number of outputs (ComfyUI's rule)."""
    assert entry.magnitude is not None
    return entry.magnitude.ndim > 1 and entry.magnitude.shape[0] != weight.shape[0]


def magnitude_shape(entry: LowRank | Hadamard | Kronecker, weight: Tensor) -> list[int]:
    """The shape in which the magnitude multiplies the weight."""
    axis = 1 if is_input_axis(entry, weight) else 0
    return [size if place == axis else 1 for place, size in enumerate(weight.shape)]


def _low_rank(entry: LowRank) -> Tensor:
    down, up = entry.down.float(), entry.up.float().flatten(1)
    if entry.mid is None:
        return up @ down.flatten(1)
    return _tucker(entry.mid.float(), up, down.flatten(1))


def _product(a: Tensor, b: Tensor, core: Tensor | None) -> Tensor:
    if core is None:
        return a.float().flatten(1) @ b.float().flatten(1)
    return _tucker(core.float(), a.float().T, b.float())


def _whole(whole: Tensor | None, a: Tensor | None, b: Tensor | None, core: Tensor | None) -> Tensor:
    if whole is not None:
        return whole.float()
    assert a is not None and b is not None
    if core is None and b.ndim > 2:  # [rank, d, k, k]
        return (a.float().flatten(1) @ b.float().flatten(1)).reshape(a.shape[0], *b.shape[1:])
    return _product(a, b, core)


def _tucker(core: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """`core` [i, j, k, l], `up` [out, i], `down` [j, in] -> [out, in, k, l]."""
    return torch.einsum("ijkl,oi,jn->onkl", core, up, down)
