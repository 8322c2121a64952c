"""One image with its caption, what is wrong with others, and all that a data path holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from sushi_research.errors import UserError
from sushi_research.fingerprints import content_hash


@dataclass(frozen=True)
class Sample:
    """One image with its caption. `name` is its path below the data folder, or `train[12]`: a row of a data set.

    Width and height, in pixels, are those after the EXIF rotation. An epoch shows the image `repeats` times. `fingerprint`
    is what near-duplicates have nearly in common (`split.fingerprint`); 0, a black picture's, is no copy of anything.
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
