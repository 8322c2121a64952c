"""The masks in the cache: of each image and crop, the mask on the grid of the latents (`data/masks.py`)."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch

from sushi_research.caches.keys import entry_key, hex_digits, packed
from sushi_research.caches.store import Store
from sushi_research.data import masks as rules
from sushi_research.data.samples import Item, Items
from sushi_research.errors import some
from sushi_research.progress import progress
from sushi_research.remembered import Remembered, columns_hash

TENSORS = ("mask",)
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


def missing_masks(store: Store, items: Items, remembered: Remembered | None = None) -> list[tuple[str, Item]]:
    """(key, item) of every mask that the store lacks, each key once, sorted by key. The keys are remembered."""
    samples = items.samples
    if samples.masks is None:
        return []
    masks = samples.masks[items.rows]

    def make() -> dict[str, np.ndarray]:
        with_mask = np.flatnonzero(masks != b"")
        # The size of the original, in the first two fields of a geometry, is not part of a key.
        kinds = np.c_[np.unique(masks[with_mask], return_inverse=True)[1], items.geometries[with_mask, 2:]]
        first = with_mask[np.unique(kinds, axis=0, return_index=True)[1]]
        keys, distinct = np.unique(packed(mask_key(items[number]) for number in first.tolist()), return_index=True)
        return {"keys": keys, "numbers": first[distinct]}

    key = columns_hash(masks, items.geometries, np.array([rules.RECIPE]))
    found = remembered.arrays("mask-keys", key, make) if remembered else make()
    lost = ~store.has(found["keys"])
    numbers = found["numbers"][lost].tolist()
    return list(zip(hex_digits(found["keys"][lost]), (items[number] for number in numbers), strict=True))


def encode_masks(store: Store, missing: Sequence[tuple[str, Item]], *, rank: int = 0, world: int = 1) -> None:
    """Adds this process's share of `missing` to the store. Warns of masks that are black within the image's crop.

    Raises UserError if a mask, or the image that has it, was changed since it was checked.
    """
    mine = [(key, item) for key, item in missing if int(key, 16) % world == rank]
    if not mine:
        return
    black = []
    with store.writer() as writer:
        for key, item in progress(mine, description="preparing masks", unit="mask", disable=rank > 0):
            sample = item.sample
            mask = rules.to_latents(
                (rules.decode if sample.load_mask else rules.alpha)(sample.read_mask()), item.geometry
            )
            writer.add(key, {"mask": torch.from_numpy(mask)}, {"mask": sample.mask_hash, "size": list(item.bucket)})
            black += [] if mask.any() else [sample.name]
    if black:
        _logger.warning(
            "the mask of %s is black within the crop of the image: all of it counts as background",
            some(sorted(black), 3),
        )
