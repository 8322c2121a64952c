"""The images of a run with their captions, as columns.

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
from sushi_research.data.columns import joined
from sushi_research.data.images import BadImage
from sushi_research.data.selected_rows import SelectedRows
from sushi_research.errors import UserError
from sushi_research.fingerprints import content_hash
from sushi_research.user_files import UnreadableFile


@dataclass(frozen=True)
class Sample:
    """One image with its caption. `name` is its path below the data folder, or a dataset row such as `train[12]`.

    Width and height, in pixels, are after the EXIF rotation. An epoch uses the image `repeats` times. `converted`: whether the
    colours are converted to sRGB (`colour.to_srgb`). `caption` is the first line, after the rules of the config that are not
    random; `lines` are all lines as they are in the file, () if the caption is the only one. `set` is the number of the data set
    in the run. `box` is the part of the image that is used: left, top, right, bottom in pixels; () is the whole image.
    `mask_hash` is the content hash of its mask, "" without one; `load_mask` reads the mask's file, and is None if the mask is the
    image's own transparency (`masks.alpha`). `load` reads the file, and `load_fingerprint` gives the fingerprint.
    """

    name: str
    image_hash: str
    caption: str
    width: int
    height: int
    repeats: int
    load: Callable[[], bytes] = field(repr=False, compare=False)
    load_fingerprint: Callable[[], int] = field(default=int, repr=False, compare=False)
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
    def fingerprint(self) -> int:
        """For finding near-duplicates (`near_duplicates.fingerprint`); 0, that of a black image, matches nothing."""
        return self.load_fingerprint()

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
    except (OSError, UnreadableFile, BadImage) as error:
        reason = error.strerror or error if isinstance(error, OSError) else error.reason
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
    fingerprints: np.ndarray | SelectedRows
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
            columns[name] = joined([getattr(part, name) for part in parts])
        for name in ("images", "widths", "heights", "repeats", "fingerprints", "converted", "sets", "rows"):
            columns[name] = np.concatenate([getattr(part, name) for part in parts])
        if any(part.plain is not None for part in parts):
            columns["plain"] = joined([part.first_captions for part in parts])
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
        # Arrow filters five times as fast as it takes.
        chosen = pyarrow.array(rows)
        select = pyarrow.compute.filter if rows.dtype == bool else pyarrow.compute.take
        columns = {name: joined([select(getattr(self, name), chosen)]) for name in ("names", "captions")}
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows
        for name in ("images", "widths", "heights", "repeats", "converted", "sets", "rows"):
            columns[name] = getattr(self, name)[rows]
        columns["fingerprints"] = SelectedRows.of(self.fingerprints).take(rows)  # the largest column, and seldom used
        if self.plain is not None:
            columns["plain"] = joined([select(self.plain, chosen)])
        if self.boxes is not None:
            columns["boxes"] = self.boxes[rows]
        masks = None if self.masks is None else self.masks[rows]
        return Samples(**columns, sources=self.sources, masks=masks, mask_sources=self.mask_sources)

    def with_masks(self, masks: np.ndarray, source: Callable[[int], bytes] | None) -> Samples:
        """The samples with these masks [N] HASH. `source` reads the mask of an image by its row; None for transparencies."""
        return replace(self, masks=masks, mask_sources=(source,) * len(self.sources))

    def by_content(self) -> np.ndarray:
        """The row numbers in an order that depends on content: by image, first caption, name and set."""
        order = np.arange(len(self))
        # As a scan sorts them: only copies of an image are sorted again.
        if (self.images[1:] >= self.images[:-1]).all():
            same = self.images[1:] == self.images[:-1]
            rows = np.flatnonzero(np.append(same, False) | np.append(False, same)) if len(self) else order
        else:
            rows = order.copy()
        if len(rows):
            kept = pyarrow.array(rows)
            columns = {"image": _texts(self.images[rows])}
            columns |= {"caption": self.first_captions.take(kept), "name": self.names.take(kept)}
            table = pyarrow.table(columns)
            if len(self.sources) > 1:  # a folder may be in two sets
                table = table.append_column("set", pyarrow.array(self.sets[rows]))
            found = pyarrow.compute.sort_indices(table, [(name, "ascending") for name in table.column_names])
            order[rows] = rows[found.to_numpy()]
        return order

    @cached_property
    def first_captions(self) -> pyarrow.Array:
        """The first caption of each sample after the rules (`plain`), as an Arrow array. Each has one, which may be empty."""
        if self.plain is not None:
            return self.plain
        texts = self.captions.flatten()
        # With one caption each these are the texts themselves, without a copy.
        return texts if len(texts) == len(self) else pyarrow.compute.list_element(self.captions, 0)

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
            # Read when it is asked for: a page of a mapped file is mapped with up to 2 MiB around it.
            load_fingerprint=partial(_fingerprint, self.fingerprints, index),
            converted=bool(self.converted[index]),
            lines=tuple(captions) if captions != [caption] else (),
            set=number,
            box=() if self.boxes is None or not self.boxes[index].any() else tuple(self.boxes[index].tolist()),
            mask_hash="" if self.masks is None else self.masks[index].decode(),
            load_mask=load_mask and partial(load_mask, row),
        )

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))


def _fingerprint(fingerprints: np.ndarray | SelectedRows, row: int) -> int:
    return int.from_bytes(fingerprints[row].tobytes(), "big")


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
