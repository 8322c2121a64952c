"""Changes of weights as matrices: products of two, sums of them, and their best approximation of a lower rank.

A change is either `Factors` (out and in by a small rank: nothing of full size is computed) or a whole matrix [out, in * k * k],
of a norm [channels, 1].
Everything is computed in fp64 for factors; the singular values of whole matrices in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from sushi_research.adapters.entries import Difference, Entry, LowRank, changed_weight, delta
from sushi_research.adapters.formats.writing import without_mid

Tensor = torch.Tensor


@dataclass(frozen=True)
class Factors:
    """The matrix `up` [out, rank] @ `down` [rank, in * k * k], both fp64."""

    up: Tensor
    down: Tensor

    def matrix(self) -> Tensor:
        """The product, fp64."""
        return self.up @ self.down

    @property
    def is_small(self) -> bool:
        """Whether the rank is below those of the whole matrix."""
        return self.up.shape[1] < min(self.up.shape[0], self.down.shape[1])


Change = Factors | Tensor


@dataclass(frozen=True)
class Spectrum:
    """The singular values of a change, in falling order, with their vectors: `u` [out, n] and `v` [n, in * k * k]; fp64."""

    u: Tensor
    values: Tensor
    v: Tensor


@dataclass(frozen=True)
class Limit:
    """How far changes are reduced: to at most `rank`, of convolutions with a kernel larger than 1x1 `conv_rank` (None: as the
    others), and to the lowest rank that keeps the share `kept` of the sum of squares. Any of them may be None."""

    rank: int | None = None
    kept: float | None = None
    conv_rank: int | None = None

    def most(self, shape: tuple[int, ...]) -> int:
        """The highest rank for a layer of this shape, before `kept` is considered."""
        wanted = self.conv_rank if self.conv_rank is not None and math.prod(shape[2:]) > 1 else self.rank
        return min(shape[0], math.prod(shape[1:])) if wanted is None else wanted

    def rank_of(self, values: Tensor, shape: tuple[int, ...]) -> int:
        """The rank for a change with these singular values."""
        most = self.most(shape)
        return most if self.kept is None else min(most, rank_for(values, self.kept))

    def describe(self) -> dict[str, float]:
        """The settings that are given, for the history of a file."""
        found = {"rank": self.rank, "conv_rank": self.conv_rank, "kept": self.kept}
        return {name: value for name, value in found.items() if value is not None}


def change_of(entry: Entry, shape: tuple[int, ...], weight: Tensor | None = None) -> Change:
    """The change of the weight of a layer of this shape. A DoRA needs the layer's `weight` (see `needs_weight`)."""
    if needs_weight(entry):
        assert weight is not None, "a DoRA changes a weight by what the weight is"
        return (changed_weight(entry, weight) - weight.float()).flatten(1)
    if isinstance(entry, LowRank):
        down = without_mid(replace(entry, down=entry.down.double())).down
        return Factors(entry.up.double().flatten(1) * entry.scale, down.flatten(1))
    return delta(entry, shape).reshape(shape[0], -1)  # of a norm [channels, 1]


def needs_weight(entry: Entry) -> bool:
    """Whether the change depends on the layer's weight (DoRA)."""
    return not isinstance(entry, Difference) and entry.magnitude is not None


def summed(changes: Sequence[Change]) -> Change:
    """The sum: of factors by concatenating them, which is exact."""
    if all(isinstance(each, Factors) for each in changes):
        return Factors(torch.cat([each.up for each in changes], 1), torch.cat([each.down for each in changes]))
    return sum(_matrix(each).float() for each in changes)  # type: ignore[return-value]


def times(change: Change, factor: float) -> Change:
    """The change multiplied by a number."""
    return Factors(change.up * factor, change.down) if isinstance(change, Factors) else change * factor


def norm(change: Change) -> float:
    """The Frobenius norm."""
    if isinstance(change, Factors) and change.is_small:
        return float(torch.linalg.matrix_norm(_core(change)[1]))
    return float(torch.linalg.vector_norm(_matrix(change), dtype=torch.float64))


def largest_norm(change: Change) -> float:
    """A bound of the norm: that of a sum whose parts do not cancel. A norm of less than its rounding is zero."""
    if isinstance(change, Factors):
        return float((change.up.norm(dim=0) * change.down.norm(dim=1)).sum())
    return norm(change)


def distance(one: Change, other: Change) -> float:
    """The Frobenius norm of the difference."""
    return norm(summed([one, times(other, -1.0)]))


def spectrum(change: Change) -> Spectrum:
    """The singular value decomposition. Of factors it is that of a small matrix between two orthogonal ones."""
    if isinstance(change, Factors) and change.is_small:
        (up, down), core = _core(change)
        u, values, v = torch.linalg.svd(core)
        return Spectrum(up @ u, values, v @ down)
    matrix = _matrix(change).float()
    # LAPACK takes five times as long for a wide matrix as for a high one.
    is_wide = matrix.shape[0] < matrix.shape[1]
    u, values, v = torch.linalg.svd(matrix.T if is_wide else matrix, full_matrices=False)
    u, v = (v.T, u.T) if is_wide else (u, v)
    return Spectrum(u.double(), values.double(), v.double())


def rank_for(values: Tensor, kept: float) -> int:
    """The lowest rank, at least 1, whose singular values have the share `kept` of the sum of all squares."""
    energy = values.square().cumsum(0)
    total = float(energy[-1])
    if total == 0:
        return 1
    # The sum of all but the last value may round to that of all.
    reached = energy >= kept * total * (1 - 1e-12)
    return 1 + int(reached.int().argmax())


def cut(name: str, found: Spectrum, rank: int, shape: tuple[int, ...], bias: Tensor | None = None) -> LowRank:
    """The best approximation of at most this rank (Eckart, Young 1936), fp32; both matrices have the root of each singular value.

    `shape` is that of the layer's weight, `bias` the change of its bias.
    """
    rank = min(rank, len(found.values), shape[0], math.prod(shape[1:]))
    roots = found.values[:rank].clamp(min=0).sqrt()
    kernel = (1,) * (len(shape) - 2)
    up = (found.u[:, :rank] * roots).float().reshape(shape[0], rank, *kernel)
    down = (found.v[:rank] * roots[:, None]).float().reshape(rank, *shape[1:])
    return LowRank(name, down, up, bias=bias)


def _core(change: Factors) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """((orthogonal columns [out, r], orthogonal rows [r, in]), the matrix [r, r] between them)."""
    q_up, r_up = torch.linalg.qr(change.up)
    q_down, r_down = torch.linalg.qr(change.down.T)
    return (q_up, q_down.T), r_up @ r_down.T


def _matrix(change: Change) -> Tensor:
    return change.matrix() if isinstance(change, Factors) else change
