"""How often an epoch uses each image: the numbers in folders' names, and the repeats, weights and roles of sets."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sushi_research.config.sets import ResolvedSet
from sushi_research.data.samples import Samples
from sushi_research.errors import UserError

# Uses of images in an epoch. Each takes some 50 bytes at the start.
MOST_ITEMS = 100_000_000


def uses_of(samples: Samples, sets: Sequence[ResolvedSet]) -> np.ndarray:
    """[N] int32: how often an epoch uses each sample, at each resolution of its set. `samples.repeats` are the folders' numbers.

    - `repeats` of a set multiplies them.
    - Sets with a weight appear in the ratio of their weights. No image of them is used less often than its folder's number, and in
      the set that has the most images for its weight exactly that often.
    - Regularisation sets with neither appear, all of them together, as often as the training images. Of more images than that, the
      others are not used (0).

    Each image is used a whole number of times; what is left of a ratio goes to the first images in the order of their content, the
    same ones in every epoch. Raises UserError for an epoch of more than MOST_ITEMS.
    """
    uses, number = samples.repeats.astype(np.int64), samples.sets
    resolutions = np.array([len(each.resolutions) for each in sets])
    for each in sets:
        if each.repeats is not None:
            uses[number == each.index] *= each.repeats
    weighted = [each for each in sets if each.weight is not None and (number == each.index).any()]
    if weighted:
        most = max(_shown(uses, number, resolutions, [each]) / (each.weight or 1) for each in weighted)
        _require_few(sum((each.weight or 1) * most for each in weighted))
        for each in weighted:
            _share_out(uses, samples, [each], resolutions, (each.weight or 1) * most)
    given = [each for each in sets if not each.is_regularisation]
    rest = [each for each in sets if each.is_regularisation and each.weight is None and each.repeats is None]
    if rest:
        _share_out(uses, samples, rest, resolutions, _shown(uses, number, resolutions, given))
    _require_few(_shown(uses, number, resolutions, sets))
    return uses.astype(np.int32)


def _require_few(items: float) -> None:
    if items > MOST_ITEMS:
        raise UserError(
            f"an epoch would have {items:.3g} uses of images, and may have {MOST_ITEMS:,}: lower the repeats, or choose weights of "
            "data.sets that are closer to the numbers of their images."
        )


def _shown(uses: np.ndarray, number: np.ndarray, resolutions: np.ndarray, sets: Sequence[ResolvedSet]) -> int:
    """How many items of these sets an epoch has."""
    inside = np.isin(number, [each.index for each in sets])
    return int((uses[inside] * resolutions[number[inside]]).sum())


def _share_out(
    uses: np.ndarray, samples: Samples, sets: Sequence[ResolvedSet], resolutions: np.ndarray, total: float
) -> None:
    """Sets the uses of the images of `sets` so that an epoch has `total` items of them, in proportion to the uses so far."""
    rows = np.flatnonzero(np.isin(samples.sets, [each.index for each in sets]))
    shown = int((uses[rows] * resolutions[samples.sets[rows]]).sum())
    if not shown:
        return
    wanted = uses[rows] * (total / shown)
    whole = np.floor(wanted + 1e-9).astype(np.int64)  # 3 x (1/3) is one use
    left = round(float(wanted.sum() - whole.sum()))
    first = np.argsort(samples.images[rows], kind="stable")[:left]
    whole[first] += 1
    uses[rows] = whole
