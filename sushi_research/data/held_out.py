"""Held-out images (a fraction of the data that is not trained on, or a separate folder), and the captions for drift."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np

from sushi_research import randomness
from sushi_research.data import near_duplicates
from sushi_research.data.buckets import BucketRule, Fitting
from sushi_research.data.near_duplicates import SEED
from sushi_research.data.samples import Items, Sample, Samples, Scan, make_items, once_each
from sushi_research.errors import UserError, some

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


def hold_out(scan: Scan, fraction: float, prior: Collection[str] = ()) -> list[Sample]:
    """Removes the held-out samples from the scan, lists their names in `scan.held_out`, and returns them.

    The choice depends only on content (`near_duplicates.held_out`), not on names, and copies and near-duplicates stay on one side.
    Images with the hashes `prior` are neither counted nor held out: held-out images measure what is learned.
    Raises UserError if no image or every image would be held out.
    """
    groups = near_duplicates.near_duplicate_groups({sample.image_hash: sample.fingerprint for sample in scan.samples})
    copies = Counter(sample.image_hash for sample in scan.samples)
    groups = [group for group in groups if not any(image in prior for image in group)]
    counted = [[image for image in group for _ in range(copies[image])] for group in groups]
    chosen = near_duplicates.held_out(counted, fraction)
    kept = [sample for sample in scan.samples if sample.image_hash not in chosen]
    held = [sample for sample in scan.samples if sample.image_hash in chosen]
    if not held or not any(sample.image_hash not in prior for sample in kept):
        alike = len(groups) < sum(map(len, counted))
        together = " (images that resemble each other stay together and count as one)" if alike else ""
        but = " that are no prior images" if prior else ""
        raise UserError(
            f"evaluation.held_out is {fraction:g}, which holds out {'all' if held else 'none'} of the {len(groups)} distinct "
            f"images in {scan.source}{but}{together}: choose another fraction, or give separate held-out images with "
            "--evaluation.path."
        )
    scan.samples = kept
    scan.held_out = sorted(sample.name for sample in held)
    return held


def require_separate(evaluation: Scan, training: Scan, key: str = "evaluation.path") -> list[str]:
    """A sentence for each image of `evaluation`, the scan of the setting `key`, that is a near-duplicate of a training image.

    Raises UserError for an image that is also trained on.
    """
    names = {sample.image_hash: sample.name for sample in training.samples}
    copies = [
        f"{sample.name} (trained on as {names[sample.image_hash]})"
        for sample in evaluation.samples
        if sample.image_hash in names
    ]
    what, instead = {
        "evaluation.path": ("held-out image", "use evaluation.held_out instead"),
        "evaluation.prior_path": (
            "prior image",
            "give a folder below data.path, some of whose images are then held out",
        ),
    }[key]
    if copies:
        raise UserError(
            f"{key}: {evaluation.source} has images that are also trained on, {some(copies, 3)}: remove "
            f"them from one of the two, or {instead}."
        )
    return _near_duplicate_warnings(what, evaluation.samples, training.samples)


def _near_duplicate_warnings(what: str, held: Sequence[Sample], trained: Sequence[Sample]) -> list[str]:
    """A sentence for each sample of `held` that is a near-duplicate of a training image. Such samples are still used."""
    names = {sample.image_hash: sample.name for sample in trained}
    fingerprints = {sample.image_hash: sample.fingerprint for sample in [*trained, *held]}
    original = {}
    for group in near_duplicates.near_duplicate_groups(fingerprints):
        of_training = [names[image] for image in group if image in names]
        original |= {image: min(of_training) for image in group if of_training}
    return [
        f"the {what} {sample.name} looks like the training image {original[sample.image_hash]}"
        for sample in held
        if sample.image_hash in original
    ]


def trained_items(items: Items, count: int, but: Collection[str]) -> Items:
    """`count` training images, or all if there are fewer, that are measured next to the held-out ones; none of the hashes in `but`.

    The choice depends only on content: the first of a fixed random order of the images. Each is taken once, with its first caption.
    """
    each = once_each(items)
    images = each.samples.images[each.rows]
    first = np.flatnonzero(np.append(True, images[1:] != images[:-1])[: len(images)])  # of the samples of each image
    found = {images[number].decode(): number for number in first.tolist()}
    order = sorted(
        found.keys() - set(but), key=lambda image: (randomness.uniform(SEED, "measured training image", image), image)
    )
    return each.take(np.array([found[image] for image in order[:count]], np.int64))


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
