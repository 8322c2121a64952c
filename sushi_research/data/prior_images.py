"""The images of evaluation.prior_path: what the base knows already (prior, regularisation or class images)."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow.compute

from sushi_research.data import near_duplicates
from sushi_research.data.samples import Sample, Samples, Scan
from sushi_research.errors import UserError, some

# Of prior images that are trained on, this fraction is held out, and no more than MOST.
FRACTION, MOST = 0.25, 8


@dataclass(frozen=True)
class PriorImages:
    """The samples for measuring what is kept, and the hashes of the prior images that are trained on."""

    samples: list[Sample] = field(default_factory=list)
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
            if any(sample.name.startswith(prefix) for sample in scan.samples):
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


def below(scan: Scan, places: Sequence[tuple[int, str]]) -> list[Sample]:
    """The samples of the scan of all sets that are in these places: (number of the set, beginning of the names)."""
    samples = Samples.of(scan.samples)
    inside = np.zeros(len(samples), bool)
    for number, prefix in places:
        begins = pyarrow.compute.starts_with(samples.names, prefix).to_numpy(zero_copy_only=False)
        inside |= begins & (samples.sets == number)
    return list(samples.take(inside))


def hold_out_prior(scan: Scan, path: str, prior: list[Sample]) -> PriorImages:
    """Moves a quarter of the `prior` samples, at most 8, out of the training samples of the scan, and names them in `scan.prior`.

    The choice is by content, as that of held-out images, and near-duplicates stay together. A prior image with a copy that is none,
    or that resembles such an image, stays in training.
    Raises UserError if there are too few, or if all of them would be held out.
    """
    groups = near_duplicates.near_duplicate_groups({sample.image_hash: sample.fingerprint for sample in scan.samples})
    copies, of_prior = Counter(sample.image_hash for sample in prior), {sample.image_hash for sample in prior}
    names = {sample.name for sample in prior}
    others = {sample.image_hash for sample in scan.samples if sample.name not in names}
    counted = [[image for image in group for _ in range(copies[image])] for group in groups if others.isdisjoint(group)]
    number = min(MOST, round(FRACTION * len(prior)))
    chosen: frozenset[str] = frozenset()
    if number and counted:
        chosen = near_duplicates.held_out(counted, min(1.0, number / sum(map(len, counted))))
    if not chosen or chosen == of_prior:
        raise UserError(
            f"evaluation.prior_path: of the {len(prior)} images of {path}, which are trained on, "
            f"{'none' if not chosen else 'all'} would be held out (a quarter, and images that resemble each other stay together): "
            "give more images, or a folder that is not below data.path."
        )
    held = [sample for sample in prior if sample.image_hash in chosen]
    scan.samples = [sample for sample in scan.samples if sample.image_hash not in chosen]
    scan.prior = sorted(sample.name for sample in held)
    return PriorImages(held, frozenset(of_prior - chosen))


def require_not_held_out(prior: Scan, held: list[Sample]) -> None:
    """Raises UserError for a prior image that is among the held-out ones, which measure what is learned."""
    hashes = {sample.image_hash for sample in held}
    both = [sample.name for sample in prior.samples if sample.image_hash in hashes]
    if both:
        raise UserError(
            f"evaluation.prior_path: {prior.source} has images that are held out to measure what is learned, {some(both, 3)}: "
            "remove them from one of the two."
        )
