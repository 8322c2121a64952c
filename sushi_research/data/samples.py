"""One image with its caption, what is wrong with others, all that a data path holds, and the items of an epoch."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sushi_research.data.buckets import BucketRule, CropGeometry, TooSmall, crop_geometry
from sushi_research.errors import UserError
from sushi_research.fingerprints import content_hash


@dataclass(frozen=True)
class Sample:
    """One image with its caption. `name` is its path below the data folder, or `train[12]`: a row of a data set.

    Width and height, in pixels, are those after the EXIF rotation. An epoch shows the image `repeats` times. `fingerprint`
    is what near-duplicates have nearly in common (`near_duplicates.fingerprint`); 0, a black picture's, is no copy of anything.
    """

    name: str
    image_hash: str
    caption: str
    width: int
    height: int
    repeats: int
    load: Callable[[], bytes] = field(repr=False, compare=False)
    fingerprint: int = field(default=0, repr=False, compare=False)

    def read(self) -> bytes:
        """The image file's bytes. Raises UserError when they are not those that were checked."""
        try:
            data = self.load()
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"{self.name} could be read before and cannot now ({reason}): put it back.") from error
        if content_hash(data) != self.image_hash:
            raise UserError(f"{self.name} was changed after it was checked: run the same command again.")
        return data


@dataclass(frozen=True)
class Problem:
    """A file, a row or a line that cannot be used, and why."""

    name: str
    reason: str


@dataclass
class Scan:
    """What a data path holds. Samples are sorted by content, so that renaming files changes nothing downstream.

    `notes` are things to know that stop nothing; `ignored` counts files that are neither image nor caption; `held_out` are
    the names of the samples that were taken out of `samples` to evaluate on.
    """

    source: str
    samples: list[Sample] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    ignored: int = 0
    held_out: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class FoundImage:
    """An image before its check. Where there is no usable caption, that problem is on record already."""

    name: str
    caption: str | None
    repeats: int
    path: Path | None
    load: Callable[[], bytes]


@dataclass(frozen=True)
class Item:
    """One element of an epoch. `instance` tells repetitions of the same picture apart, so each has noise of its own."""

    sample: Sample
    geometry: CropGeometry
    instance: int

    @property
    def bucket(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.geometry.height, self.geometry.width

    @property
    def identity(self) -> tuple[str, int]:
        """What randomness is keyed on: the picture's content and the instance, never a name or a position."""
        return self.sample.image_hash, self.instance


def make_items(samples: Sequence[Sample], rule: BucketRule) -> tuple[list[Item], list[Problem]]:
    """The items of an epoch, in an order that depends on content alone, and the samples too small for any bucket."""
    items, problems, seen = [], [], Counter()
    for sample in sorted(samples, key=lambda sample: (sample.image_hash, sample.caption, sample.name)):
        try:
            geometry = crop_geometry(sample.width, sample.height, rule)
        except TooSmall as error:
            problems.append(Problem(sample.name, str(error)))
            continue
        for _ in range(sample.repeats):
            items.append(Item(sample, geometry, seen[sample.image_hash]))
            seen[sample.image_hash] += 1
    return items, problems


def dataset_hash(items: Sequence[Item]) -> str:
    """Hash of what is trained on: pictures, captions, repetitions and crop geometries; file names do not enter."""
    digest = hashlib.blake2b(digest_size=16)
    for item in items:
        digest.update(repr((item.identity, item.sample.caption, item.geometry)).encode())
    return digest.hexdigest()
