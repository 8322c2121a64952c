"""The images of evaluation.prior_path: what the base knows already (prior, regularisation or class images)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow.compute

from sushi_research.data import near_search
from sushi_research.data.samples import Sample, Samples
from sushi_research.data.scan import Scan
from sushi_research.errors import UserError, some
from sushi_research.remembered import NOTHING_REMEMBERED, Remembered

# Of prior images that are trained on, this fraction is held out, and no more than MOST.
FRACTION, MOST = 0.25, 8


@dataclass(frozen=True)
class PriorImages:
    """The samples for measuring what is kept, and the hashes of the prior images that are trained on."""

    samples: Sequence[Sample] = field(default_factory=list)
    trained: frozenset[str] = frozenset()


def places_below(scans: Sequence[Scan], path: str) -> list[tuple[int, str]]:
    """(number of the set, beginning of the names) where the scans of the sets have samples in the folder `path`; [] if it is
    elsewhere. UserError if `path` is the folder of the only set."""
    found = []
    for number, scan in enumerate(scans):
        for prefix in _prefixes(scan.source, path):
            if prefix == "" and len(scans) == 1:
                raise UserError(
                    f"evaluation.prior_path is data.path itself, {path}: give a folder below it with the prior images only, or "
                    "another one."
                )
            if _begin_with(Samples.of(scan.samples), prefix).any():
                found.append((number, prefix))
                break
    return found


def _prefixes(source: str, path: str) -> list[str]:
    """How the names of images in the folder `path` may begin in the scan of the folder `source`; [] if it is elsewhere."""
    if not (os.path.isdir(source) and os.path.isdir(path)):
        return []
    if os.path.samefile(source, path):
        return [""]
    # A link below the folder is followed, and names have the link's name.
    inside = ((source, os.path.abspath(path)), (os.path.realpath(source), os.path.realpath(path)))
    return [
        os.path.relpath(inner, outer).replace(os.sep, "/") + "/"
        for outer, inner in inside
        if inner.startswith(outer.rstrip(os.sep) + os.sep)
    ]


def below(scan: Scan, places: Sequence[tuple[int, str]]) -> Samples:
    """The samples of the scan of all sets that are in these places: (number of the set, beginning of the names)."""
    samples = Samples.of(scan.samples)
    inside = np.zeros(len(samples), bool)
    for number, prefix in places:
        inside |= _begin_with(samples, prefix) & (samples.sets == number)
    return samples.take(inside)


def _begin_with(samples: Samples, prefix: str) -> np.ndarray:
    """Whether the name of each sample begins with `prefix`: bool [N]."""
    return _mask(pyarrow.compute.starts_with(samples.names, prefix))


def hold_out_prior(scan: Scan, path: str, prior: Samples, remembered: Remembered = NOTHING_REMEMBERED) -> PriorImages:
    """Moves a quarter of the `prior` samples, at most 8, out of the training samples of the scan, and names them in `scan.prior`.

    The choice is by content, as that of held-out images, and near-duplicates stay together. A prior image with a copy that is none,
    or that resembles such an image, stays in training.
    Raises UserError if there are too few, or if all of them would be held out.
    """
    samples = Samples.of(scan.samples)
    is_prior = _mask(pyarrow.compute.is_in(samples.names, value_set=prior.names))
    number = min(MOST, round(FRACTION * len(prior)))
    chosen = near_search.choose(samples, is_prior, number, remembered).chosen
    of_prior = {image.decode() for image in samples.images[is_prior & ~chosen]}
    if not chosen.any() or not of_prior:
        what = "all" if chosen.any() else "none"
        raise UserError(
            f"evaluation.prior_path: of the {len(prior)} images of {path}, which are trained on, {what} would be held out "
            "(a quarter, and images that resemble each other stay together): give more images, or a folder that is not below "
            "data.path."
        )
    held, scan.samples = samples.take(chosen), samples.take(~chosen)
    scan.prior = sorted(held.names.to_pylist())
    return PriorImages(held, frozenset(of_prior))


def require_not_held_out(prior: Scan, held: Sequence[Sample]) -> None:
    """Raises UserError for a prior image that is among the held-out ones, which measure what is learned."""
    samples, others = Samples.of(prior.samples), Samples.of(held)
    both = samples.names.take(pyarrow.array(np.flatnonzero(near_search.rows_of(samples.images, others.images) >= 0)))
    if len(both):
        raise UserError(
            f"evaluation.prior_path: {prior.source} has images that are held out to measure what is learned, "
            f"{some(both.to_pylist(), 3)}: remove them from one of the two."
        )


def _mask(array: pyarrow.BooleanArray) -> np.ndarray:
    return array.to_numpy(zero_copy_only=False)
