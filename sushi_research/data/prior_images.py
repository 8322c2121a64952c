"""The images of evaluation.prior_path: what the base knows already (prior, regularisation or class images)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow
import pyarrow.compute

from sushi_research.data import near_search
from sushi_research.data.samples import Sample, Samples, Scan
from sushi_research.errors import UserError, some
from sushi_research.remembered import Remembered

# Of prior images that are trained on, this fraction is held out, and no more than MOST.
FRACTION, MOST = 0.25, 8


@dataclass(frozen=True)
class PriorImages:
    """The samples for measuring what is kept, and the hashes of the prior images that are trained on."""

    samples: Sequence[Sample] = field(default_factory=list)
    trained: frozenset[str] = frozenset()


def below(scan: Scan, path: str) -> Samples:
    """The samples of the scan of a folder of images that are in its subfolder `path`; none if it is elsewhere.

    UserError if `path` is the scanned folder itself.
    """
    samples = Samples.of(scan.samples)
    if not (os.path.isdir(scan.source) and os.path.isdir(path)):
        return samples[:0]
    if os.path.samefile(scan.source, path):
        raise UserError(
            f"evaluation.prior_path is data.path itself, {path}: give a folder below it with the prior images only, or another one."
        )
    # A link below the folder is followed, and names have the link's name.
    for source, inner in (
        (scan.source, os.path.abspath(path)),
        (os.path.realpath(scan.source), os.path.realpath(path)),
    ):
        if inner.startswith(source.rstrip(os.sep) + os.sep):
            prefix = os.path.relpath(inner, source).replace(os.sep, "/") + "/"
            if (is_below := _mask(pyarrow.compute.starts_with(samples.names, prefix))).any():
                return samples.take(is_below)
    return samples[:0]


def hold_out_prior(scan: Scan, path: str, prior: Samples, remembered: Remembered | None = None) -> PriorImages:
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
