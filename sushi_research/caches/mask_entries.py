"""The masks in the cache: of each image and crop, the mask on the grid of the latents (`data/masks.py`)."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from sushi_research.caches.keys import PACKED, entry_key, owners, packed
from sushi_research.caches.store import Store
from sushi_research.config.sets import ResolvedSet
from sushi_research.data import masks as rules
from sushi_research.data.items import Item, Items
from sushi_research.errors import some
from sushi_research.progress import progress
from sushi_research.remembered import Remembered, columns_hash

MASK_TENSORS = ("mask",)
_logger = logging.getLogger(__name__)


def mask_key(item: Item) -> str:
    """The key of an item's mask: its content, and how the image is resized and cropped. A mirrored image has the same entry."""
    geometry = item.geometry
    return entry_key(
        recipe=rules.RECIPE,
        mask=item.sample.mask_hash,
        resized=[geometry.resized_height, geometry.resized_width],
        crop=[geometry.crop_top, geometry.crop_left],
        size=[geometry.height, geometry.width],
    )


@dataclass(frozen=True, eq=False)
class MaskEntries:
    """n distinct entries, sorted by key: entry i is the mask of the item `crops[parts[i]][numbers[i]]`.

    `keys` [n] of PACKED, `parts` [n] int32, `numbers` [n] int64.
    """

    keys: np.ndarray
    parts: np.ndarray
    numbers: np.ndarray
    crops: tuple[Items, ...]

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, chosen: np.ndarray) -> MaskEntries:
        """The entries at these numbers, or where a bool array [n] is true, in that order."""
        return replace(self, keys=self.keys[chosen], parts=self.parts[chosen], numbers=self.numbers[chosen])

    def item(self, entry: int) -> Item:
        return self.crops[self.parts[entry]][int(self.numbers[entry])]

    @property
    def bytes(self) -> int:
        """The bytes of their tensors: 2 for each latent."""
        total = 0
        for part, items in enumerate(self.crops):
            sizes = items.geometries[self.numbers[self.parts == part], 6:].astype(np.int64) // rules.SCALE
            total += 2 * int(sizes.prod(1).sum())
        return total


def mask_entries(crops: Iterable[Items], remembered: Remembered) -> MaskEntries:
    """The distinct entries of items with masks, given with each of their crops. The keys are remembered."""
    crops = tuple(items for items in crops if items.samples.masks is not None)
    masks = [items.samples.masks[items.rows] for items in crops]

    def make() -> dict[str, np.ndarray]:
        with_mask = [np.flatnonzero(each != b"") for each in masks]
        parts = np.concatenate([np.full(len(each), part, np.int32) for part, each in enumerate(with_mask)])
        numbers = np.concatenate(with_mask)
        hashes = np.concatenate([each[rows] for each, rows in zip(masks, with_mask, strict=True)])
        geometries = [items.geometries[rows] for items, rows in zip(crops, with_mask, strict=True)]
        # The size of the original, in the first two fields of a geometry, is not part of a key.
        kinds = np.c_[np.unique(hashes, return_inverse=True)[1], np.concatenate(geometries)[:, 2:]]
        first = np.unique(kinds, axis=0, return_index=True)[1]
        found = (crops[parts[row]][int(numbers[row])] for row in first.tolist())
        keys, distinct = np.unique(packed(map(mask_key, found)), return_index=True)
        return {"keys": keys, "parts": parts[first[distinct]], "numbers": numbers[first[distinct]]}

    if not crops:
        return MaskEntries(np.zeros(0, PACKED), np.zeros(0, np.int32), np.zeros(0, np.int64), ())
    key = columns_hash(*masks, *(items.geometries for items in crops), np.array([rules.RECIPE]))
    return MaskEntries(**remembered.arrays("mask-keys", key, make), crops=crops)


def encode_masks(
    store: Store, missing: MaskEntries, sets: Sequence[ResolvedSet], *, rank: int = 0, world: int = 1
) -> None:
    """Adds this process's share of `missing` to the store. Warns of masks that are all background within the image's crop.

    Raises UserError if a mask, or the image that has it, was changed since it was checked.
    """
    mine = np.flatnonzero(owners(missing.keys, world) == rank).tolist()
    without: list[str] = []
    with store.writer() as writer:
        for entry in progress(mine, description="preparing masks", unit="mask", disable=rank > 0 or not mine):
            item = missing.item(entry)
            mask = rules.to_latents(rules.of_sample(item.sample), item.geometry)
            metadata = {"mask": item.sample.mask_hash, "size": list(item.bucket)}
            writer.add(mask_key(item), {"mask": torch.from_numpy(mask)}, metadata)
            background = 1 if sets[item.sample.set].masks.invert else 0
            without += [item.sample.name] if (mask == background).all() else []
    if without:
        _logger.warning(
            "by the mask of %s, all of the image's crop counts as background",
            some(sorted(without), 3),
        )
