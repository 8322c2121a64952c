"""The types of the data: samples, problems, the scan of a data path, and the items of an epoch.

A data set may have a million images. So samples and items are columns (`Samples`, `Items`), and a single `Sample` or `Item` is made
when it is asked for. Code that looks at every row works on the columns.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, overload

import numpy as np
import pyarrow
import pyarrow.compute

from sushi_research.data import colour
from sushi_research.data.buckets import (
    BucketRule,
    CropGeometry,
    Fitting,
    crop_geometries,
    random_crops,
    too_small_reason,
)
from sushi_research.errors import UserError
from sushi_research.fingerprints import content_hash
from sushi_research.user_files import UnreadableFile


@dataclass(frozen=True)
class Sample:
    """One image with its caption. `name` is its path below the data folder, or a dataset row such as `train[12]`.

    Width and height, in pixels, are after the EXIF rotation. An epoch uses the image `repeats` times. `fingerprint` is for
    finding near-duplicates (`near_duplicates.fingerprint`); 0, that of a black image, matches nothing. `converted`: whether
    the colours are converted to sRGB (`colour.to_srgb`). `caption` is the first line, after the rules of the config that are not
    random; `lines` are all lines as they are in the file, () if the caption is the only one. `set` is the number of the data set
    in the run. `box` is the part of the image that is used: left, top, right, bottom in pixels; () is the whole image.
    `mask_hash` is the content hash of its mask, "" without one; `load_mask` reads the mask's file, and is None if the mask is the
    image's own transparency (`masks.alpha`).
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
    lines: tuple[str, ...] = ()
    set: int = 0
    box: tuple[int, ...] = ()
    mask_hash: str = ""
    load_mask: Callable[[], bytes] | None = field(default=None, repr=False, compare=False)

    @property
    def captions(self) -> tuple[str, ...]:
        """All lines of the caption, as they are in the file."""
        return self.lines or (self.caption,)

    @property
    def colour_recipe(self) -> dict[str, int]:
        """What must be part of a key of the pixels: nothing, if they are those of the file."""
        return {"colour": colour.RECIPE} if self.converted else {}

    def read(self) -> bytes:
        """The bytes of the image file. Raises UserError if they cannot be read or have changed since the check."""
        return _read_again(self.name, self.load, self.image_hash)

    def read_mask(self) -> bytes:
        """The bytes of the file that has the mask: the mask's own, or the image's. Raises UserError as `read` does."""
        if self.load_mask is None:
            return self.read()
        return _read_again(f"the mask of {self.name}", self.load_mask, self.mask_hash)


def _read_again(name: str, load: Callable[[], bytes], expected: str) -> bytes:
    try:
        data = load()
    except (OSError, UnreadableFile) as error:
        reason = error.reason if isinstance(error, UnreadableFile) else error.strerror or error
        raise UserError(f"{name} could be read before but not now ({reason}): restore it.") from error
    if content_hash(data) != expected:
        raise UserError(f"{name} was changed after it was checked: run the same command again.")
    return data


# Bytes of `near_duplicates.fingerprint`.
FINGERPRINT_BYTES = 192
# 32 hex digits; `.decode()` gives the text of `Sample.image_hash`.
HASH = np.dtype("S32")


@dataclass(frozen=True, eq=False)
class Samples(Sequence[Sample]):
    """N samples in columns: `names` (large_string) and `captions` (large_list of large_string) are Arrow arrays, the others NumPy.

    `images` [N] HASH are the content hashes; `widths`, `heights` and `repeats` [N] int32; `fingerprints` [N, FINGERPRINT_BYTES]
    uint8; `converted` [N] bool; `sets` [N] int16. `sources[sets[i]](rows[i])` reads the bytes of image i; `rows` is [N] int64.
    `plain` (large_string) are the first captions after the rules of the config (`captions.rules.Rules.plain`); None: as they are.
    `boxes` [N, 4] int32 are those of `Sample.box`, zeros for the whole image; None if no image has one.
    `masks` [N] HASH are the content hashes of the masks, empty where there is none; None if no image has one. `mask_sources` read
    masks as `sources` read images; None for a set whose masks are the images' own transparency.
    """

    names: pyarrow.Array
    images: np.ndarray
    captions: pyarrow.Array
    widths: np.ndarray
    heights: np.ndarray
    repeats: np.ndarray
    fingerprints: np.ndarray
    converted: np.ndarray
    sets: np.ndarray
    rows: np.ndarray
    sources: tuple[Callable[[int], bytes], ...]
    plain: pyarrow.Array | None = None
    boxes: np.ndarray | None = None
    masks: np.ndarray | None = None
    mask_sources: tuple[Callable[[int], bytes] | None, ...] = ()

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Samples:
        """The samples as columns. Those that are columns already are returned as they are."""
        if isinstance(samples, Samples):
            return samples
        size = 1 + max((sample.set for sample in samples), default=0)
        loads = [sample.load for sample in samples]
        source = partial(_load_nth, loads)
        plain = any(sample.caption != sample.captions[0] for sample in samples)
        return cls(
            names=pyarrow.array([sample.name for sample in samples], pyarrow.large_string()),
            images=np.array([sample.image_hash for sample in samples], HASH),
            captions=pyarrow.array(
                [sample.captions for sample in samples],
                pyarrow.large_list(pyarrow.large_string()),
            ),
            widths=np.array([sample.width for sample in samples], np.int32),
            heights=np.array([sample.height for sample in samples], np.int32),
            repeats=np.array([sample.repeats for sample in samples], np.int32),
            fingerprints=np.frombuffer(
                b"".join(sample.fingerprint.to_bytes(FINGERPRINT_BYTES, "big") for sample in samples), np.uint8
            ).reshape(-1, FINGERPRINT_BYTES),
            converted=np.array([sample.converted for sample in samples], bool),
            sets=np.array([sample.set for sample in samples], np.int16),
            rows=np.arange(len(samples)),
            sources=(source,) * size,
            plain=pyarrow.array([each.caption for each in samples], pyarrow.large_string()) if plain else None,
            boxes=_boxes([sample.box or (0, 0, 0, 0) for sample in samples]),
            **_mask_columns(samples, size),
        )

    @classmethod
    def concat(cls, parts: Sequence[Samples]) -> Samples:
        """The samples of all `parts`, one after the other. Each part keeps its set numbers, whose sources must be its own."""
        assert parts
        sources = [None] * max(len(part.sources) for part in parts)
        for part in parts:
            for number in np.unique(part.sets).tolist():
                assert sources[number] is None, f"two parts have samples of the set {number}"
                sources[number] = part.sources[number]
        columns = {}
        for name in ("names", "captions"):
            columns[name] = _joined([getattr(part, name) for part in parts])
        for name in ("images", "widths", "heights", "repeats", "fingerprints", "converted", "sets", "rows"):
            columns[name] = np.concatenate([getattr(part, name) for part in parts])
        if any(part.plain is not None for part in parts):
            columns["plain"] = _joined([part.first_captions for part in parts])
        if any(part.boxes is not None for part in parts):
            boxes = [np.zeros((len(part), 4), np.int32) if part.boxes is None else part.boxes for part in parts]
            columns["boxes"] = np.concatenate(boxes)
        if any(part.masks is not None for part in parts):
            columns["masks"] = np.concatenate([_masks_of(part) for part in parts])
            columns["mask_sources"] = tuple(
                next(
                    (one for part in parts if (one := _mask_source(part, number)) and (part.sets == number).any()), None
                )
                for number in range(len(sources))
            )
        return cls(**columns, sources=tuple(sources))

    def in_set(self, number: int, folder: str = "") -> Samples:
        """The samples as those of the set of this number in a run; `folder`, if given, becomes the first part of their names."""
        assert len(self.sources) == 1 and not self.sets.any()
        names = self.names
        if folder:
            prefix = pyarrow.scalar(f"{folder}/", pyarrow.large_string())
            names = pyarrow.compute.binary_join_element_wise(prefix, names, pyarrow.scalar("", pyarrow.large_string()))
        before = (None,) * number
        return replace(
            self,
            names=names,
            sets=np.full(len(self), number, np.int16),
            sources=(*before, *self.sources),
            mask_sources=(*before, *self.mask_sources) if self.mask_sources else (),
        )

    def take(self, rows: np.ndarray) -> Samples:
        """The samples at these row numbers, or where a bool array of length N is true, in that order."""
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows
        columns = {name: _joined([getattr(self, name).take(pyarrow.array(rows))]) for name in ("names", "captions")}
        for name in ("images", "widths", "heights", "repeats", "fingerprints", "converted", "sets", "rows"):
            columns[name] = getattr(self, name)[rows]
        if self.plain is not None:
            columns["plain"] = _joined([self.plain.take(pyarrow.array(rows))])
        if self.boxes is not None:
            columns["boxes"] = self.boxes[rows]
        masks = None if self.masks is None else self.masks[rows]
        return Samples(**columns, sources=self.sources, masks=masks, mask_sources=self.mask_sources)

    def with_masks(self, masks: np.ndarray, source: Callable[[int], bytes] | None) -> Samples:
        """The samples with these masks [N] HASH. `source` reads the mask of an image by its row; None for transparencies."""
        return replace(self, masks=masks, mask_sources=(source,) * len(self.sources))

    def by_content(self) -> np.ndarray:
        """The row numbers in an order that depends on content: by image, first caption and name."""
        table = pyarrow.table({"image": _texts(self.images), "caption": self.first_captions, "name": self.names})
        order = pyarrow.compute.sort_indices(table, [(name, "ascending") for name in table.column_names])
        return order.to_numpy().astype(np.int64)

    @cached_property
    def first_captions(self) -> pyarrow.Array:
        """The first caption of each sample after the rules (`plain`), as an Arrow array. Each has one, which may be empty."""
        return pyarrow.compute.list_element(self.captions, 0) if self.plain is None else self.plain

    def __len__(self) -> int:
        return len(self.images)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Samples: ...
    def __getitem__(self, index: int | slice) -> Sample | Samples:
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        index = operator.index(index)
        captions = self.captions[index].as_py()  # raises IndexError beyond the end
        caption = captions[0] if self.plain is None else self.plain[index].as_py()
        number, row = int(self.sets[index]), int(self.rows[index])
        load_mask = _mask_source(self, number)
        return Sample(
            name=self.names[index].as_py(),
            image_hash=self.images[index].decode(),
            caption=caption,
            width=int(self.widths[index]),
            height=int(self.heights[index]),
            repeats=int(self.repeats[index]),
            load=partial(self.sources[number], row),
            fingerprint=int.from_bytes(self.fingerprints[index].tobytes(), "big"),
            converted=bool(self.converted[index]),
            lines=tuple(captions) if captions != [caption] else (),
            set=number,
            box=() if self.boxes is None or not self.boxes[index].any() else tuple(self.boxes[index].tolist()),
            mask_hash="" if self.masks is None else self.masks[index].decode(),
            load_mask=load_mask and partial(load_mask, row),
        )

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))


def _boxes(boxes: Sequence[tuple[int, ...]]) -> np.ndarray | None:
    return np.array(boxes, np.int32) if any(map(any, boxes)) else None


def _load_nth(loads: Sequence[Callable[[], bytes]], row: int) -> bytes:
    return loads[row]()


def _mask_columns(samples: Sequence[Sample], sets: int) -> dict[str, Any]:
    if not any(sample.mask_hash for sample in samples):
        return {}
    loads = [sample.load_mask for sample in samples]
    of_files = {sample.set for sample in samples if sample.load_mask}
    return {
        "masks": np.array([sample.mask_hash for sample in samples], HASH),
        "mask_sources": tuple(partial(_load_nth, loads) if number in of_files else None for number in range(sets)),
    }


def _masks_of(samples: Samples) -> np.ndarray:
    return np.zeros(len(samples), HASH) if samples.masks is None else samples.masks


def _mask_source(samples: Samples, number: int) -> Callable[[int], bytes] | None:
    return samples.mask_sources[number] if number < len(samples.mask_sources) else None


def _texts(hashes: np.ndarray) -> pyarrow.Array:
    """A column of hashes as Arrow's fixed-size binary, without a Python object per row."""
    data = np.ascontiguousarray(hashes)
    return pyarrow.FixedSizeBinaryArray.from_buffers(
        pyarrow.binary(HASH.itemsize), len(data), [None, pyarrow.py_buffer(data)]
    )


def _strings(texts: Sequence[str]) -> pyarrow.Array:
    return pyarrow.array(texts, pyarrow.large_string())


def _joined(parts: Sequence[pyarrow.Array | pyarrow.ChunkedArray]) -> pyarrow.Array:
    """Arrow arrays or chunked arrays as one array."""
    chunks = [chunk for part in parts for chunk in (part.chunks if isinstance(part, pyarrow.ChunkedArray) else [part])]
    return pyarrow.concat_arrays(chunks)


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
            key: _joined([part if isinstance(part, pyarrow.Array) else _strings(part) for part in each])
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
        return np.unique((height << 16) + width, return_inverse=True)

    @cached_property
    def used(self) -> Samples:
        """The samples of the items, each once, in the order of the items."""
        rows, first = np.unique(self.rows, return_index=True)
        rows = rows[np.argsort(first)]
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
            parts.append((rows[~too_small], np.full((~too_small).sum(), resolution), geometries[~too_small]))
        for row in np.flatnonzero(
            ~fits
        ).tolist():  # there are few; the last resolution's reason is as good as another's
            sample = samples[int(rows[row])]
            box = fitting.crop == "box" and sample.box
            width, height = (box[2] - box[0], box[3] - box[1]) if box else (sample.width, sample.height)
            reason = ("its box of " if box else "") + too_small_reason(width, height, geometries[row], rule)
            problems.append(Problem(sample.name, reason))
    rows, resolutions, geometries = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    order = np.lexsort((resolutions, _ranks(samples.by_content())[rows]))
    order = np.repeat(order, samples.repeats[rows[order]])
    rows = rows[order]
    crops = np.array([fitting.crops if fitting.crop == "random" else 1 for fitting in fittings], np.int16)
    items = Items(samples, rows, _instances(samples.images[rows]), geometries[order])
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
    sizes, ids = np.unique((widths << 32) + heights, return_inverse=True)
    geometries, too_small = crop_geometries(sizes >> 32, sizes & 0xFFFFFFFF, rule, squeeze=fitting.crop == "none")
    return geometries[ids], too_small[ids]


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
    starts = np.flatnonzero(np.r_[True, images[1:] != images[:-1]])
    lengths = np.diff(np.r_[starts, len(images)])
    return (np.arange(len(images)) - np.repeat(starts, lengths)).astype(np.int32)
