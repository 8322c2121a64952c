"""The types of the data: samples, problems, the scan of a data path, and the items of an epoch."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path

from sushi_research.data import colour
from sushi_research.data.buckets import BucketRule, CropGeometry, TooSmall, crop_geometry
from sushi_research.errors import UserError
from sushi_research.fingerprints import content_hash
from sushi_research.user_files import UnreadableFile


@dataclass(frozen=True)
class Sample:
    """One image with its caption. `name` is its path below the data folder, or a dataset row such as `train[12]`.

    Width and height, in pixels, are after the EXIF rotation. An epoch uses the image `repeats` times. `fingerprint` is for
    finding near-duplicates (`near_duplicates.fingerprint`); 0, that of a black image, matches nothing. `converted`: whether
    the colours are converted to sRGB (`colour.to_srgb`).
    """

    name: str
    image_hash: str
    caption: str
    width: int
    height: int
    repeats: int
    load: Callable[[], bytes] = field(repr=False, compare=False)
    fingerprint: int = field(default=0, repr=False, compare=False)
    converted: bool = False

    @property
    def colour_recipe(self) -> dict[str, int]:
        """What must be part of a key of the pixels: nothing, if they are those of the file."""
        return {"colour": colour.RECIPE} if self.converted else {}

    def read(self) -> bytes:
        """The bytes of the image file. Raises UserError if they cannot be read or have changed since the check."""
        try:
            data = self.load()
        except (OSError, UnreadableFile) as error:
            reason = error.reason if isinstance(error, UnreadableFile) else error.strerror or error
            raise UserError(f"{self.name} could be read before but not now ({reason}): restore it.") from error
        if content_hash(data) != self.image_hash:
            raise UserError(f"{self.name} was changed after it was checked: run the same command again.")
        return data


@dataclass(frozen=True)
class Problem:
    """A file, a row or a line that cannot be used, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Crop:
    """An image that loses `lost`, a fraction of its area, to the crop that fits it to its bucket (WIDTHxHEIGHT)."""

    name: str
    lost: float
    bucket: str


@dataclass
class Scan:
    """The content of a data path. Samples are sorted by content, so that renaming files changes nothing downstream.

    `cropped` are the images that lose much to the crop, the largest loss first; `notes` are remarks that do not stop a run;
    `skipped` are those about folders and pictures that this program wrote; `ignored` counts files that are neither image nor
    caption; `held_out` and `prior` have the names of the samples that were moved out of `samples` for evaluation, `prior` those of
    prior images. `is_table`: an HF dataset, and no folder of images.
    """

    source: str
    samples: list[Sample] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    cropped: list[Crop] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    ignored: int = 0
    held_out: list[str] = field(default_factory=list)
    prior: list[str] = field(default_factory=list)
    is_table: bool = False


@dataclass(frozen=True)
class FoundImage:
    """An image before its check. If it has no usable caption, that problem is already recorded."""

    name: str
    caption: str | None
    repeats: int
    path: Path | None
    load: Callable[[], bytes]


@dataclass(frozen=True)
class Item:
    """One element of an epoch. `instance` numbers the repetitions of an image, so that each gets its own noise."""

    sample: Sample
    geometry: CropGeometry
    instance: int

    @property
    def bucket(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.geometry.height, self.geometry.width

    @property
    def identity(self) -> tuple[str, int]:
        """The key for randomness: the image's content hash and the instance, never a name or a position."""
        return self.sample.image_hash, self.instance


def make_items(samples: Sequence[Sample], rule: BucketRule) -> tuple[list[Item], list[Problem]]:
    """The items of an epoch, in an order that depends only on content, and a problem for each sample that is too small."""
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
    """Hash of the training data: images as they are decoded, captions, repetitions and crop geometries, but not file names."""
    digest = hashlib.blake2b(digest_size=16)
    for item in items:
        recipe = item.sample.colour_recipe
        digest.update(repr((item.identity, item.sample.caption, astuple(item.geometry), *recipe.items())).encode())
    return digest.hexdigest()
