"""Held-out images (a fraction of the data that is not trained on, or a separate folder), and the captions for drift."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np

from sushi_research import randomness
from sushi_research.data import near_search
from sushi_research.data.buckets import BucketRule, Fitting
from sushi_research.data.items import Items, make_items, once_each
from sushi_research.data.near_duplicates import SEED
from sushi_research.data.samples import Sample, Samples
from sushi_research.data.scan import Scan
from sushi_research.errors import UserError, some
from sushi_research.remembered import NOTHING_REMEMBERED, Remembered, columns_hash

# Content hashes of images: texts, or a column [n] HASH.
Hashes = Collection[str] | np.ndarray

# Everyday subjects, similar to what most adapters are trained on (people, animals, places, paintings), in various styles.
DRIFT_CAPTIONS = (
    "a photo of a woman reading a newspaper at a kitchen table",
    "a portrait of an old man with a grey beard, oil painting",
    "a child running through a sprinkler in a garden",
    "two friends laughing in a cafe",
    "a brown dog asleep on a sofa",
    "a white horse in a field at sunrise",
    "a red bicycle leaning against a brick wall",
    "a bowl of oranges on a wooden table, still life",
    "a crowded street market in the rain at night",
    "a mountain lake with pine trees and mist",
    "a lighthouse on a cliff, watercolour",
    "a spaceship landing in a desert, digital art",
    "a medieval castle, pencil drawing",
    "a city skyline at dusk seen from a rooftop",
    "a close-up of a bee on a sunflower",
    "an empty room with white walls and a window",
)


def hold_out(scan: Scan, fraction: float, prior: Hashes = (), remembered: Remembered = NOTHING_REMEMBERED) -> Samples:
    """Removes the held-out samples from the scan, lists their names in `scan.held_out`, and returns them.

    The choice depends only on content (`near_search.choose`), not on names, and copies and near-duplicates stay on one side.
    Images with the hashes `prior` are neither counted nor held out: held-out images measure what is learned.
    Raises UserError if no image or every image would be held out.
    """
    samples = Samples.of(scan.samples)
    is_prior = near_search.is_one_of(samples.images, prior)
    choice = near_search.choose(samples, ~is_prior, fraction, remembered)
    if not choice.chosen.any() or not (~choice.chosen & ~is_prior).any():
        alike = choice.groups < choice.images
        together = " (images that resemble each other stay together and count as one)" if alike else ""
        but = " that are no prior images" if len(prior) else ""
        raise UserError(
            f"evaluation.held_out is {fraction:g}, which holds out {'all' if choice.chosen.any() else 'none'} of the "
            f"{choice.groups} distinct images in {scan.source}{but}{together}: choose another fraction, or give separate held-out "
            "images with --evaluation.path."
        )
    held, scan.samples = samples.take(choice.chosen), samples.take(~choice.chosen)
    scan.held_out = sorted(held.names.to_pylist())
    return held


def require_separate(
    evaluation: Scan, training: Scan, key: str = "evaluation.path", remembered: Remembered = NOTHING_REMEMBERED
) -> list[str]:
    """A sentence for each image of `evaluation`, the scan of the setting `key`, that is a near-duplicate of a training image.

    Raises UserError for an image that is also trained on.
    """
    held, trained = Samples.of(evaluation.samples), Samples.of(training.samples)
    both = near_search.rows_of(held.images, trained.images)
    what, instead = {
        "evaluation.path": ("held-out image", "use evaluation.held_out instead"),
        "evaluation.prior_path": (
            "prior image",
            "give a folder below data.path, some of whose images are then held out",
        ),
    }[key]
    if (both >= 0).any():
        copies = [
            f"{held.names[row]} (trained on as {trained.names[both[row]]})"
            for row in np.flatnonzero(both >= 0).tolist()
        ]
        raise UserError(
            f"{key}: {evaluation.source} has images that are also trained on, {some(copies, 3)}: remove "
            f"them from one of the two, or {instead}."
        )
    near = near_search.nearest(held, trained, remembered)
    found = [
        f"the {what} {held.names[row]} looks like the training image {trained.names[int(near[row])]}"
        for row in np.flatnonzero(near >= 0).tolist()
    ]
    if len(held) > len(near):
        found.append(f"of the {len(held)} {what}s only {len(near)} were compared with the training images")
    return found


def trained_items(items: Items, count: int, but: Hashes, remembered: Remembered = NOTHING_REMEMBERED) -> Items:
    """`count` training images, or all if there are fewer, that are measured next to the held-out ones; none of the hashes in `but`.

    The choice depends only on content: the first of a fixed random order of the images. Each is taken once, with its first caption.
    """
    if not count:
        return items.take(np.zeros(0, np.int64))
    each = once_each(items)
    images = each.samples.images[each.rows]

    def make() -> dict[str, np.ndarray]:
        is_first = np.append(True, images[1:] != images[:-1])[: len(images)]  # of the samples of each image
        rows = np.flatnonzero(is_first & ~near_search.is_one_of(images, but))
        numbers = [randomness.uniform(SEED, "measured training image", image.decode()) for image in images[rows]]
        return {"rows": rows[np.lexsort((images[rows], numbers))[:count]]}

    key = columns_hash(images, np.array([count]), near_search.as_column(but))
    return each.take(remembered.arrays("measured-training", key, make)["rows"])


def held_out_items(samples: Sequence[Sample], fittings: BucketRule | Sequence[Fitting]) -> Items:
    """The items of the held-out samples, each once regardless of repeats, at its highest resolution. All must fit a bucket.

    They are cropped at the center where training crops at random.
    """
    columns = Samples.of(samples)
    if not isinstance(fittings, BucketRule):
        fittings = [replace(each, crop="center") if each.crop == "random" else each for each in fittings]
    items, too_small = make_items(replace(columns, repeats=np.ones(len(columns), np.int32)), fittings)
    assert not too_small, too_small
    return once_each(items)
