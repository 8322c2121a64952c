"""The items of an epoch: each use of a sample at a crop geometry, as columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import overload

import numpy as np

from sushi_research.data.buckets import (
    BucketRule,
    CropGeometry,
    Fitting,
    crop_geometries,
    random_crops,
    too_small_reason,
)
from sushi_research.data.columns import distinct_numbers
from sushi_research.data.samples import Sample, Samples
from sushi_research.data.scan import Problem


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


@dataclass(frozen=True, eq=False)
class Items(Sequence[Item]):
    """The n items of an epoch in columns: `rows` [n] int64 in `samples`, `instances` [n] int32, and `geometries` [n, 8] int32, the
    fields of `CropGeometry` in their order.

    `crops` [n] int16 is the number of random crops that an item has, one of which each epoch uses (`cropped`); None: one each, as
    it is in `geometries`.
    """

    samples: Samples
    rows: np.ndarray
    instances: np.ndarray
    geometries: np.ndarray
    crops: np.ndarray | None = None

    @cached_property
    def buckets(self) -> tuple[tuple[int, int], ...]:
        """The distinct (height, width) in pixels, sorted."""
        return tuple(divmod(code, 1 << 16) for code in self._codes[0].tolist())

    @cached_property
    def bucket_ids(self) -> np.ndarray:
        """[n] int32: the number of each item's bucket in `buckets`."""
        return self._codes[1].astype(np.int32)

    @cached_property
    def _codes(self) -> tuple[np.ndarray, np.ndarray]:
        height, width = self.geometries[:, 6].astype(np.int64), self.geometries[:, 7]
        return distinct_numbers((height << 16) + width)

    @cached_property
    def used(self) -> Samples:
        """The samples of the items, each once, in the order of the items."""
        rows = self.rows
        if not (rows[1:] > rows[:-1]).all():
            distinct, first = np.unique(rows, return_index=True)
            rows = distinct[np.argsort(first)]
        is_all = len(rows) == len(self.samples) and bool((rows[1:] > rows[:-1]).all())
        return self.samples if is_all else self.samples.take(rows)

    def take(self, numbers: np.ndarray) -> Items:
        """The items at these numbers, or where a bool array of length n is true, in that order."""
        crops = None if self.crops is None else self.crops[numbers]
        return Items(self.samples, self.rows[numbers], self.instances[numbers], self.geometries[numbers], crops)

    @property
    def most_crops(self) -> int:
        """The largest number of random crops of an item."""
        return 1 if self.crops is None or not len(self.crops) else int(self.crops.max())

    def cropped(self, numbers: np.ndarray) -> Items:
        """The same items, each with its random crop of this number [n], which is below its `crops`."""
        if self.crops is None:
            return self
        geometries = self.geometries.copy()
        for count in np.unique(self.crops[self.crops > 1]).tolist():
            one = self.crops == count
            geometries[one] = random_crops(geometries[one], self.samples.images[self.rows[one]], numbers[one], count)
        return Items(self.samples, self.rows, self.instances, geometries)

    def every_crop(self) -> Iterator[Items]:
        """The items with each of their crops, crop by crop: the first gives all of them, the next those that have a second."""
        yield self.cropped(np.zeros(len(self), np.int64))
        for number in range(1, self.most_crops):
            having = self.take(self.crops > number)
            yield having.cropped(np.full(len(having), number))

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> Items: ...
    def __getitem__(self, index: int | slice) -> Item | Items:
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        geometry = CropGeometry(*self.geometries[index].tolist())  # raises IndexError beyond the end
        return Item(self.samples[int(self.rows[index])], geometry, int(self.instances[index]))

    def __iter__(self) -> Iterator[Item]:
        return (self[index] for index in range(len(self)))


def make_items(samples: Sequence[Sample], fittings: BucketRule | Sequence[Fitting]) -> tuple[Items, list[Problem]]:
    """The items of an epoch, in an order that depends only on content, and a problem for each sample that is too small.

    `fittings` has one entry per set, or is the rule of all samples. A sample with several resolutions is used at each of them,
    `repeats` times; it is too small if it is so at all of them.
    """
    samples = Samples.of(samples)
    if isinstance(fittings, BucketRule):
        fittings = (Fitting((fittings,)),) * len(samples.sources)
    parts, problems = [], []
    for number, fitting in enumerate(fittings):
        rows = np.flatnonzero(samples.sets == number)
        fits = np.zeros(len(rows), bool)
        for resolution, rule in enumerate(fitting.rules):
            geometries, too_small = _geometries(samples, rows, fitting, rule)
            fits |= ~too_small
            columns = rows, np.full(len(rows), resolution, np.int16), geometries
            parts.append(tuple(each[~too_small] for each in columns) if too_small.any() else columns)
        # The reason of the last resolution is as good as another's.
        for row in np.flatnonzero(~fits).tolist():
            sample = samples[int(rows[row])]
            box = fitting.crop == "box" and sample.box
            width, height = (box[2] - box[0], box[3] - box[1]) if box else (sample.width, sample.height)
            reason = ("its box of " if box else "") + too_small_reason(width, height, geometries[row], rule)
            problems.append(Problem(sample.name, reason))
    rows, resolutions, geometries = (
        parts[0] if len(parts) == 1 else (np.concatenate(columns) for columns in zip(*parts, strict=True))
    )
    ranks = _ranks(samples.by_content())[rows]
    # A large set at one resolution, each image once, is in order already and is not copied.
    if not (ranks[1:] > ranks[:-1]).all() or (samples.repeats[rows] != 1).any():
        order = np.lexsort((resolutions, ranks))
        order = np.repeat(order, samples.repeats[rows[order]])
        rows, geometries = rows[order], geometries[order]
    crops = np.array([fitting.crops if fitting.crop == "random" else 1 for fitting in fittings], np.int16)
    items = Items(samples, rows, _instances(samples.images[rows]), geometries)
    if crops.max() > 1:
        items = replace(items, crops=crops[samples.sets[rows]])
    return items, problems


def _geometries(
    samples: Samples, rows: np.ndarray, fitting: Fitting, rule: BucketRule
) -> tuple[np.ndarray, np.ndarray]:
    """`crop_geometries` of some rows. Images of one size, of which there are usually many, are computed once."""
    widths, heights = samples.widths[rows].astype(np.int64), samples.heights[rows]
    if fitting.crop == "box" and samples.boxes is not None:
        boxes, whole = samples.boxes[rows], np.stack([0 * widths, 0 * widths, widths, heights], 1)
        return crop_geometries(widths, heights, rule, boxes=np.where(boxes.any(1)[:, None], boxes, whole))
    sizes, ids = distinct_numbers((widths << 32) + heights)
    geometries, too_small = crop_geometries(sizes >> 32, sizes & 0xFFFFFFFF, rule, squeeze=fitting.crop == "none")
    return geometries.take(ids, axis=0), too_small[ids]


def once_each(items: Items) -> Items:
    """Each sample of the items once, at its last geometry: that of its highest resolution."""
    last = np.flatnonzero(np.diff(items.rows, append=-1))
    rows = items.rows[last]
    return Items(items.samples, rows, _instances(items.samples.images[rows]), items.geometries[last])


def _ranks(order: np.ndarray) -> np.ndarray:
    """The place of each row in an order of row numbers."""
    ranks = np.empty(len(order), np.int64)
    ranks[order] = np.arange(len(order))
    return ranks


def _instances(images: np.ndarray) -> np.ndarray:
    """The number of earlier rows with the same image, of rows in the order of their images: [n] int32."""
    if not len(images):
        return np.zeros(0, np.int32)
    is_first = np.append(True, images[1:] != images[:-1])
    if is_first.all():
        return np.zeros(len(images), np.int32)
    starts = np.flatnonzero(is_first)
    lengths = np.diff(np.r_[starts, len(images)])
    return (np.arange(len(images)) - np.repeat(starts, lengths)).astype(np.int32)
