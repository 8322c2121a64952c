"""The entries of the image cache that a run needs: their keys, and the images, crops and mirrorings that they are made of.

A data set may have a million images, so the entries are columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import torch

from sushi_research.caches.keys import PACKED, RECIPE, canonical_json, digest, entry_key
from sushi_research.data import colour
from sushi_research.data.buckets import CropGeometry
from sushi_research.data.items import Item, Items
from sushi_research.data.samples import HASH
from sushi_research.fingerprints import content_hash
from sushi_research.remembered import NOTHING_REMEMBERED, Remembered, columns_hash

# Rows whose keys are made at a time: bounds the memory for Python's objects.
_ROWS = 50_000
# What stands for the image's hash in a template.
_IMAGE = "?" * HASH.itemsize


def latent_key(item: Item, flip: bool, vae_hash: str, dtype: torch.dtype) -> str:
    """The key of an image's posterior: image bytes, VAE weights and dtype, and everything that determines the VAE's input."""
    sample = item.sample
    return entry_key(**_recipe(sample.image_hash, item.geometry, sample.converted, flip, vae_hash, dtype))


def _recipe(
    image: str, geometry: CropGeometry, converted: bool, flip: bool, vae_hash: str, dtype: torch.dtype
) -> dict[str, Any]:
    """What a key is the hash of.

    The colour recipe is part of it only if the image is converted, so that the entries of other images remain valid.
    """
    return {
        "recipe": RECIPE,
        "image": image,
        "vae": vae_hash,
        "dtype": str(dtype),
        "resized": [geometry.resized_height, geometry.resized_width],
        "crop": [geometry.crop_top, geometry.crop_left],
        "size": [geometry.height, geometry.width],
        "flip": flip,
    } | ({"colour": colour.RECIPE} if converted else {})


@dataclass(frozen=True)
class _Columns:
    """What decides the keys of n items: `images` [n] HASH, `converted` [n] bool, `geometries` [n, 8] int32 (CropGeometry)."""

    images: np.ndarray
    converted: np.ndarray
    geometries: np.ndarray

    @classmethod
    def of(cls, items: Sequence[Item]) -> _Columns:
        if isinstance(items, Items):
            converted = items.samples.converted[items.rows]
        else:
            converted = np.array([item.sample.converted for item in items], bool)
        return cls(_images(items), converted, _geometries(items))


def _images(items: Sequence[Item]) -> np.ndarray:
    if isinstance(items, Items):
        return items.samples.images[items.rows]
    return np.array([item.sample.image_hash for item in items], HASH)


def _geometries(items: Sequence[Item]) -> np.ndarray:
    if isinstance(items, Items):
        return items.geometries
    return np.array([astuple(item.geometry) for item in items], np.int32).reshape(-1, 8)


def latent_keys(items: Sequence[Item], flip: bool, vae_hash: str, dtype: torch.dtype) -> np.ndarray:
    """`latent_key` of each item, as a column [n] of PACKED."""
    return _keys(_Columns.of(items), flip, vae_hash, dtype)


def _keys(columns: _Columns, flip: bool, vae_hash: str, dtype: torch.dtype) -> np.ndarray:
    """All that is hashed but the image is the same for many items, so it is written once for each crop."""
    # The size of the original, in the first two fields, is not part of a key.
    kinds = np.c_[np.zeros((len(columns.images), 2), np.int32), columns.geometries[:, 2:], columns.converted]
    distinct, numbers = np.unique(kinds, axis=0, return_inverse=True)
    templates = []
    for *geometry, converted in distinct.tolist():
        recipe = _recipe(_IMAGE, CropGeometry(*geometry), bool(converted), flip, vae_hash, dtype)
        before, after = canonical_json(recipe).encode().split(_IMAGE.encode())
        templates.append((before, after))
    keys = []
    for start in range(0, len(columns.images), _ROWS):
        part = slice(start, start + _ROWS)
        rows = zip(columns.images[part].tolist(), numbers[part].tolist(), strict=True)
        keys.append(b"".join([digest(templates[kind][0] + image + templates[kind][1]) for image, kind in rows]))
    return np.frombuffer(b"".join(keys), PACKED)


@dataclass(frozen=True, eq=False)
class LatentEntries:
    """n distinct entries, sorted by key: entry i is that of the item `items[parts[i]][numbers[i]]`, mirrored if `flips[i]`.

    `keys` [n] of PACKED, `parts` [n] int32, `numbers` [n] int64, `flips` [n] bool.
    """

    keys: np.ndarray
    parts: np.ndarray
    numbers: np.ndarray
    flips: np.ndarray
    items: tuple[Sequence[Item], ...]

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, chosen: np.ndarray) -> LatentEntries:
        """The entries at these numbers, or where a bool array [n] is true, in that order."""
        return LatentEntries(
            self.keys[chosen], self.parts[chosen], self.numbers[chosen], self.flips[chosen], self.items
        )

    def item(self, entry: int) -> Item:
        return self.items[self.parts[entry]][int(self.numbers[entry])]

    @property
    def buckets(self) -> np.ndarray:
        """[n, 2] int32: the height and width of each in pixels."""
        return self._column(lambda items: _geometries(items)[:, 6:], (2,), np.int32)

    @property
    def images(self) -> np.ndarray:
        """[n] HASH: the image of each."""
        return self._column(_images, (), HASH)

    def _column(
        self, of: Callable[[Sequence[Item]], np.ndarray], shape: tuple[int, ...], dtype: np.typing.DTypeLike
    ) -> np.ndarray:
        found = np.zeros((len(self), *shape), dtype)
        for part, items in enumerate(self.items):
            members = self.parts == part
            found[members] = of(items)[self.numbers[members]]
        return found

    @property
    def bytes(self) -> int:
        """The bytes of their tensors: mean and standard deviation, 4 channels, 1/8 of each side, 2 bytes per value."""
        return int((self.buckets.astype(np.int64) // 8).prod(1).sum()) * 2 * 4 * 2

    def by_bucket(self) -> LatentEntries:
        """The same entries sorted by bucket; those of one image in a bucket are next to each other."""
        heights, widths = self.buckets.T
        return self.take(np.lexsort((self.flips, self.numbers, self.parts, self.images, widths, heights)))


def latent_entries(
    wanted: Sequence[tuple[Sequence[Item], bool]],
    vae_hash: str,
    dtype: torch.dtype,
    remembered: Remembered = NOTHING_REMEMBERED,
) -> LatentEntries:
    """The distinct entries of all items, each given with whether it is mirrored. The keys are remembered."""
    columns = [_Columns.of(items) for items, _ in wanted]

    def make() -> dict[str, np.ndarray]:
        keys = [_keys(part, flip, vae_hash, dtype) for part, (_, flip) in zip(columns, wanted, strict=True)]
        distinct, first = np.unique(np.concatenate([np.empty(0, PACKED), *keys]), return_index=True)
        ends = np.cumsum([len(part) for part in keys])
        parts = np.searchsorted(ends, first, side="right").astype(np.int32)
        starts = np.r_[0, ends][parts]
        return {"keys": distinct, "parts": parts, "numbers": first - starts}

    facts = [columns_hash(part.images, part.converted, part.geometries) for part in columns]
    flips = [flip for _, flip in wanted]
    key = content_hash(canonical_json([RECIPE, colour.RECIPE, vae_hash, str(dtype), facts, flips]).encode())
    found = remembered.arrays("latent-entries", key, make)
    return LatentEntries(
        **found,
        flips=np.array(flips, bool)[found["parts"]] if flips else np.empty(0, bool),
        items=tuple(items for items, _ in wanted),
    )
