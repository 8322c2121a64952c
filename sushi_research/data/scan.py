"""What was found at a data path: samples, problems, and what is said about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import pyarrow
import pyarrow.compute

from sushi_research.data.columns import joined, strings
from sushi_research.data.samples import Sample


@dataclass(frozen=True)
class Problem:
    """A file, a row or a line that cannot be used, and why."""

    name: str
    reason: str


@dataclass(frozen=True, eq=False)
class Problems(Sequence[Problem]):
    """Problems in columns: their `names` and `reasons` are Arrow arrays (large_string)."""

    names: pyarrow.Array
    reasons: pyarrow.Array

    @classmethod
    def of(cls, *parts: Sequence[Problem]) -> Problems:
        """The problems of all parts, sorted by name and reason."""
        columns = {
            key: joined([part if isinstance(part, pyarrow.Array) else strings(part) for part in each])
            for key, each in (
                ("names", [part.names if isinstance(part, cls) else [p.name for p in part] for part in parts]),
                ("reasons", [part.reasons if isinstance(part, cls) else [p.reason for p in part] for part in parts]),
            )
        }
        order = pyarrow.compute.sort_indices(pyarrow.table(columns), [(key, "ascending") for key in columns])
        return cls(**{key: column.take(order) for key, column in columns.items()})

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, index: int) -> Problem: ...
    @overload
    def __getitem__(self, index: slice) -> list[Problem]: ...
    def __getitem__(self, index: int | slice) -> Problem | list[Problem]:
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        return Problem(self.names[index].as_py(), self.reasons[index].as_py())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)


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
    prior images. `is_table`: an HF dataset, and no folder of images. `sets` has the path and the numbers of images and problems of
    each set, if the run has several.
    """

    source: str
    samples: Sequence[Sample] = field(default_factory=list)
    problems: Sequence[Problem] = field(default_factory=list)
    cropped: list[Crop] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    ignored: int = 0
    held_out: list[str] = field(default_factory=list)
    prior: list[str] = field(default_factory=list)
    is_table: bool = False
    sets: list[dict[str, Any]] = field(default_factory=list)
