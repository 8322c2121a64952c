"""Finds images that resemble no other image, for holding out, and near-duplicates of a few images among many.

`near_duplicates` compares all pairs, so its time grows with the square of the number of images. Up to MOST_GROUPED images are
compared so. Of more images, candidates are compared with all images one after the other, in the order in which images are held out,
and at most MOST_COMPARED of them: the time grows with the number of images, and the memory does not. While so many images resemble
no other, the chosen ones are those of comparing all pairs.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import pyarrow.compute

from sushi_research import randomness, stopping
from sushi_research.data.near_duplicates import (
    SEED,
    held_out,
    is_near,
    near_duplicate_groups,
    tangent_planes,
    thumbnails_of,
)
from sushi_research.data.samples import HASH, Samples
from sushi_research.data.selected_rows import SelectedRows
from sushi_research.progress import progress
from sushi_research.remembered import NOTHING_REMEMBERED, Remembered, columns_hash

# Of so many images all pairs are compared, in about two seconds on one core.
MOST_GROUPED = 4096
# At most so many are compared with all others if there are more: 0.1 s for each among a million images on one core.
MOST_COMPARED = 1000
LIMIT = (
    f"of more than {MOST_GROUPED:,} images at most {MOST_COMPARED:,} are compared with the others, and those that resemble another "
    "image stay in training"
)
# Compared at once: 20 MB.
CANDIDATES, BLOCK = 64, 2048
# Increment it when another image could be chosen, or another pair be found.
VERSION = 1


@dataclass(frozen=True)
class Choice:
    """The chosen samples, a bool array [N]; `groups` and `images` are how many could be chosen, near-duplicates as one and each."""

    chosen: np.ndarray
    groups: int
    images: int


def choose(
    samples: Samples, eligible: np.ndarray, share: float | int, remembered: Remembered = NOTHING_REMEMBERED
) -> Choice:
    """Chooses images to hold out, near-duplicates together: a fraction of the eligible ones (float), or a number of them (int).

    `eligible` is a bool array [N]. An image is eligible if all samples of it are, and all of its near-duplicates (of more than
    MOST_GROUPED images: if it has none). Copies of an image count as often as they are there. The choice depends on content only
    (`near_duplicates.held_out`). Raises UserError for a fraction that is not between 0 and 1.
    """

    def make() -> dict[str, np.ndarray]:
        images, first, place, copies = np.unique(
            samples.images, return_index=True, return_inverse=True, return_counts=True
        )
        eligible_images = np.bincount(place[eligible], minlength=len(images)) == copies
        find = _all_pairs if len(images) <= MOST_GROUPED else _one_by_one
        fingerprints = SelectedRows.of(samples.fingerprints).take(first)
        chosen, groups, total = find(images, fingerprints, copies, eligible_images, share)
        return {"rows": np.flatnonzero(chosen[place]), "counts": np.array([groups, total])}

    # Fingerprints follow from the images' content.
    key = columns_hash(samples.images, eligible, np.array([share]), np.array([VERSION]))
    found = remembered.arrays("held-out", key, make)
    chosen = np.zeros(len(samples), bool)
    chosen[found["rows"]] = True
    return Choice(chosen, *found["counts"].tolist())


def _all_pairs(
    images: np.ndarray, fingerprints: SelectedRows, copies: np.ndarray, eligible: np.ndarray, share: float | int
) -> tuple[np.ndarray, int, int]:
    """(chosen images, a bool array; the number of groups that could be chosen; the number of images in them) by groups."""
    row_of = {image.decode(): row for row, image in enumerate(images)}
    numbers = (int.from_bytes(each.tobytes(), "big") for each in np.asarray(fingerprints))
    groups = near_duplicate_groups(dict(zip(row_of, numbers, strict=True)))
    groups = [group for group in groups if all(eligible[row_of[image]] for image in group)]
    counted = [[image for image in group for _ in range(copies[row_of[image]])] for group in groups]
    total = sum(map(len, counted))
    chosen = np.zeros(len(images), bool)
    for image in held_out(counted, _fraction(share, total)):
        chosen[row_of[image]] = True
    return chosen, len(groups), total


def _one_by_one(
    images: np.ndarray, fingerprints: SelectedRows, copies: np.ndarray, eligible: np.ndarray, share: float | int
) -> tuple[np.ndarray, int, int]:
    """As `_all_pairs`, of images without near-duplicates and copies. The numbers count images that were not compared too."""
    total = int(copies[eligible].sum())
    rows = np.flatnonzero(eligible & (copies == 1))
    numbers = np.array([randomness.uniform(SEED, "held out", image.decode()) for image in images[rows]])
    order = rows[np.lexsort((images[rows], numbers))][:MOST_COMPARED]
    wanted, found = round(_fraction(share, total) * total), np.zeros(0, np.int64)
    hidden = len(images) < 50_000 or not stopping.is_first()
    with progress(total=len(order), description="comparing images", unit="image", disable=hidden) as bar:
        for start in range(0, len(order), CANDIDATES):
            if len(found) >= wanted:
                break
            part = order[start : start + CANDIDATES]
            found = np.concatenate(
                [found, part[first_near(np.asarray(fingerprints.take(part)), fingerprints, part) < 0]]
            )
            bar.update(len(part))
    chosen = np.zeros(len(images), bool)
    chosen[found[:wanted]] = True
    return chosen, int(eligible.sum()), total


def _fraction(share: float | int, total: int) -> float:
    """The share as a fraction of `total` images."""
    return share if isinstance(share, float) else min(1.0, share / max(1, total))


def nearest(samples: Samples, others: Samples, remembered: Remembered = NOTHING_REMEMBERED) -> np.ndarray:
    """For each of the first MOST_COMPARED samples, the row in `others` of a near-duplicate of it, or -1: int64 [M]."""

    def make() -> dict[str, np.ndarray]:
        near = SelectedRows.of(others.fingerprints)
        candidates = np.asarray(SelectedRows.of(samples.fingerprints).take(slice(MOST_COMPARED)))
        parts = range(0, len(candidates), CANDIDATES)
        found = [first_near(candidates[start : start + CANDIDATES], near) for start in parts]
        return {"rows": np.concatenate([np.zeros(0, np.int64), *found])}

    key = columns_hash(samples.images[:MOST_COMPARED], others.images, np.array([VERSION]))
    return remembered.arrays("near-duplicates", key, make)["rows"]


def first_near(candidates: np.ndarray, fingerprints: SelectedRows, own: np.ndarray | None = None) -> np.ndarray:
    """The row in `fingerprints` [N, 192] uint8 of the first image that is a near-duplicate of each of `candidates` [M, 192], or -1:
    int64 [M]. `own` [M] are the rows of the candidates themselves, if they are among the images."""
    found = np.full(len(candidates), -1)
    sides, planes = thumbnails_of(candidates), tangent_planes(candidates)
    for start in range(0, len(fingerprints), BLOCK):
        block = np.asarray(fingerprints.take(slice(start, start + BLOCK)))
        # The candidate or its mirror image; the same pairs as comparing it with the image or the mirror image of that.
        near = [is_near(planes, side) for side in thumbnails_of(block)]
        for number in np.flatnonzero((found < 0) & (near[0] | near[1]).any(1)).tolist():
            rows = [np.flatnonzero(each[number]) for each in near]
            if own is not None:
                rows = [each[each + start != own[number]] for each in rows]
            # In the other direction too (see `near_duplicate_groups`).
            hits = [
                each[is_near(tangent_planes(block[each]), side[number : number + 1])[:, 0]]
                for each, side in zip(rows, sides, strict=True)
            ]
            if first := [int(each[0]) for each in hits if len(each)]:
                found[number] = start + min(first)
    return found


def is_one_of(images: np.ndarray, hashes: Collection[str] | np.ndarray) -> np.ndarray:
    """Which of the images [N] HASH have one of these content hashes: bool [N]."""
    return rows_of(images, as_column(hashes)) >= 0


def as_column(hashes: Collection[str] | np.ndarray) -> np.ndarray:
    """Content hashes as a column: texts are sorted, and a column is returned as it is."""
    return hashes if isinstance(hashes, np.ndarray) else np.array(sorted(hashes), HASH)


def rows_of(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """For each of the images [M] HASH, the row of one with the same content hash in `others` [N] HASH, or -1: int64 [M]."""
    if not len(others):
        return np.full(len(images), -1)
    if len(images) < len(others) and (others[1:] >= others[:-1]).all():  # as samples are sorted: no table of all others
        places = np.minimum(np.searchsorted(others, images), len(others) - 1)
        return np.where(others[places] == images, places, -1)
    found = pyarrow.compute.index_in(pyarrow.array(images), value_set=pyarrow.array(others))
    return found.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
