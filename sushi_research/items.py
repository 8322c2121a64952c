"""Training items: a sample, where it lies in its bucket, and which repetition of its picture it is."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from sushi_research.buckets import BucketRule, Placement, TooSmall, place
from sushi_research.dataset import Problem, Sample


@dataclass(frozen=True)
class Item:
    """One element of an epoch. `instance` tells repetitions of the same picture apart, so each has noise of its own."""

    sample: Sample
    placement: Placement
    instance: int

    @property
    def bucket(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.placement.height, self.placement.width

    @property
    def identity(self) -> tuple[str, int]:
        """What randomness is keyed on: the picture's content and the instance, never a name or a position."""
        return self.sample.image_hash, self.instance


def make_items(samples: Sequence[Sample], rule: BucketRule) -> tuple[list[Item], list[Problem]]:
    """The items of an epoch, in an order that depends on content alone, and the samples too small for any bucket."""
    items, problems, seen = [], [], Counter()
    for sample in sorted(samples, key=lambda sample: (sample.image_hash, sample.caption, sample.name)):
        try:
            placement = place(sample.width, sample.height, rule)
        except TooSmall as error:
            problems.append(Problem(sample.name, str(error)))
            continue
        for _ in range(sample.repeats):
            items.append(Item(sample, placement, seen[sample.image_hash]))
            seen[sample.image_hash] += 1
    return items, problems


def dataset_hash(items: Sequence[Item]) -> str:
    """Hash of what is trained on: pictures, captions, repetitions and placements; file names do not enter."""
    digest = hashlib.blake2b(digest_size=16)
    for item in items:
        digest.update(repr((item.identity, item.sample.caption, item.placement)).encode())
    return digest.hexdigest()
