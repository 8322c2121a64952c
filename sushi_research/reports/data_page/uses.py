"""How an epoch uses the images of a data set: how often, at which crop geometry and in which bucket."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sushi_research.data.buckets import CropGeometry
from sushi_research.data.items import Items
from sushi_research.data.samples import Sample


@dataclass(frozen=True)
class Use:
    """An image at one resolution, and how often an epoch uses it so. `crops` are its random crops, or the one that it has.

    `item` is the number of the first of its items.
    """

    sample: Sample
    crops: tuple[CropGeometry, ...]
    count: int
    item: int

    @property
    def geometry(self) -> CropGeometry:
        return self.crops[0]

    @property
    def scale(self) -> float:
        """How much the image is enlarged to cover its bucket: 1.5 makes 100 pixels 150; below 1 it is reduced."""
        return self.geometry.resized_height / self.geometry.original_height

    @property
    def squeezed(self) -> float:
        """How much one side is reduced more than the other, as a fraction; 0 where only rounding differs."""
        one, other = self.scale, self.geometry.resized_width / self.geometry.original_width
        rounding = max(0.5 / self.geometry.original_height, 0.5 / self.geometry.original_width)
        return 1 - min(one, other) / max(one, other) if abs(one - other) > rounding else 0.0

    @property
    def bucket(self) -> str:
        return f"{self.geometry.width}x{self.geometry.height}"


@dataclass(frozen=True)
class Uses:
    """The uses of an epoch as columns: `items[first[i]]` is the first item of use i, of which there are `counts[i]`.

    `geometries` [n, 8] has the fields of CropGeometry in their order. Sorted by bucket (the most frequent first), then by the
    order of the items, which depends only on content.
    """

    items: Items
    first: np.ndarray
    counts: np.ndarray
    geometries: np.ndarray

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, place: int) -> Use:
        number = int(self.first[place])
        crops = [each[0].geometry for each in self.items.take(np.array([number])).every_crop()]
        return Use(self.items[number].sample, tuple(crops), int(self.counts[place]), number)

    @property
    def scales(self) -> np.ndarray:
        """`Use.scale` of each use, [n] float64."""
        return self.geometries[:, 2] / self.geometries[:, 0]

    @property
    def cut_away(self) -> np.ndarray:
        """`CropGeometry.cut_away` of each use, [n] float64."""
        sides = self.geometries.astype(np.int64)
        return 1 - sides[:, 6] * sides[:, 7] / (sides[:, 2] * sides[:, 3])

    def buckets(self) -> list[tuple[str, slice]]:
        """(WIDTHxHEIGHT, the places of its uses) of each bucket, in order."""
        shapes = self.geometries[:, 6:8]
        starts = np.flatnonzero(np.r_[True, (shapes[1:] != shapes[:-1]).any(axis=1)]) if len(self) else np.zeros(0, int)
        ends = np.r_[starts[1:], len(self)]
        return [
            (f"{shapes[start, 1]}x{shapes[start, 0]}", slice(int(start), int(end)))
            for start, end in zip(starts, ends, strict=True)
        ]


def uses_of(items: Items) -> Uses:
    """The uses of the items of an epoch."""
    keys = [items.rows, *items.geometries.T]
    order = np.lexsort(keys[::-1])  # stable, so the first of equal items comes first
    starts = np.zeros(len(items), bool)
    starts[:1] = True
    for key in keys:
        starts[1:] |= key[order][1:] != key[order][:-1]
    first = order[starts]
    counts = np.diff(np.r_[np.flatnonzero(starts), len(items)])
    bucket = items.bucket_ids[first]
    in_bucket = np.bincount(bucket, counts, len(items.buckets))[bucket]
    by_bucket = np.lexsort([first, bucket, -in_bucket])
    return Uses(items, first[by_bucket], counts[by_bucket], items.geometries[first[by_bucket]])


def spread(count: int, most: int) -> list[int]:
    """At most `most` of the places 0..count-1, evenly spaced, with the first and the last."""
    if count <= most:
        return list(range(count))
    return np.unique(np.linspace(0, count - 1, most).round().astype(int)).tolist()
