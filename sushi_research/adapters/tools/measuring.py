"""Compares the changes that a written adapter file makes with those that it should make."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from sushi_research.adapters.entries import Entry
from sushi_research.adapters.tools.base_weights import Weights
from sushi_research.adapters.tools.located import Located, each_entry
from sushi_research.adapters.tools.low_rank import Change, change_of, distance, largest_norm, needs_weight, norm
from sushi_research.progress import progress

# Below this relative error two changes are the same but for the rounding of fp64, in which they are compared.
EXACT = 1e-12
# (component, layer path) -> the change that a layer should have.
Expected = Callable[[str, str], Change]


@dataclass(frozen=True)
class Errors:
    """Over all layers: the sums of squares of the differences (`lost`) and of what should be there, and the worst layer.

    `zero` layers should not change, because changes cancel or there are none: of those, errors are relative to what cancels.
    """

    layers: int
    zero: int
    lost: float
    total: float
    worst: float
    where: str

    @property
    def relative(self) -> float:
        """The Frobenius norm of all differences over that of all changes."""
        return (self.lost / self.total) ** 0.5 if self.total else 0.0

    def line(self) -> str:
        """For people."""
        if self.worst <= EXACT and self.zero == self.layers:
            return f"none, but the result is zero: it changes none of its {self.layers:,} layers"
        if self.worst <= EXACT:
            return f"none: all {self.layers:,} layers change as they should"
        return f"{self.relative:.3g} of the norm of the change (largest in a layer: {self.worst:.3g}, {self.where})"


def measure(written: Located, expected: Expected, weights: Weights | None) -> Errors:
    """The errors of a file that was written. Without the weights of a base, those of a DoRA are of its low-rank pair alone
    (`without_magnitude`, for `expected` too)."""
    lost = total = worst = 0.0
    where, zero = "", 0
    layers = [*each_entry(written.matches)]
    for component, path, entry in progress(layers, description="measuring the error", unit="layer", leave=False):
        weight = weights.get(component, f"{path}.weight") if weights and needs_weight(entry) else None
        found = change_of(
            entry if weight is not None else without_magnitude(entry), written.shapes[component][path], weight
        )
        wanted = expected(component, path)
        missed, size, most = distance(found, wanted), norm(wanted), largest_norm(wanted)
        if size <= EXACT * most:  # what is left of changes that cancel is their rounding
            size, zero = most, zero + 1
        lost, total = lost + missed**2, total + size**2
        # A change that should be zero has no relative error.
        if missed > worst * size:
            worst, where = (missed / size if size else float("inf")), f"{component}: {path}"
    return Errors(len(layers), zero, lost, total, worst, where)


def without_magnitude(entry: Entry) -> Entry:
    """The entry as if it were no DoRA."""
    return replace(entry, magnitude=None) if needs_weight(entry) else entry


def same_magnitudes(written: Located, source: Located) -> bool:
    """Whether the magnitudes of a file are those of another, to the rounding of its dtype."""
    for component, path, entry in each_entry(written.matches):
        own, other = (getattr(each, "magnitude", None) for each in (entry, source.matches[component][path]))
        if (own is None) != (other is None):
            return False
        if own is not None and not torch.equal(own.flatten(), other.to(own.dtype).flatten()):
            return False
    return True
