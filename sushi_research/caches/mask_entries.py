"""The masks in the cache: of each image and crop, the mask on the grid of the latents (`data/masks.py`)."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

import torch

from sushi_research.caches.store import Store, entry_key
from sushi_research.data import masks
from sushi_research.data.samples import Item
from sushi_research.errors import some
from sushi_research.progress import progress

TENSORS = ("mask",)
_logger = logging.getLogger(__name__)


def mask_key(item: Item) -> str:
    """The key of an item's mask: its content, and how the image is resized and cropped. A mirrored image has the same entry."""
    geometry = item.geometry
    return entry_key(
        recipe=masks.RECIPE,
        mask=item.sample.mask_hash,
        resized=[geometry.resized_height, geometry.resized_width],
        crop=[geometry.crop_top, geometry.crop_left],
        size=[geometry.height, geometry.width],
    )


def missing_masks(store: Store, items: Iterable[Item]) -> list[tuple[str, Item]]:
    """(key, item) of every mask that the store lacks, each key once, sorted by key."""
    wanted = {mask_key(item): item for item in items if item.sample.mask_hash}
    return [(key, wanted[key]) for key in sorted(wanted) if key not in store]


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
            mask = masks.to_latents(
                (masks.decode if sample.load_mask else masks.alpha)(sample.read_mask()), item.geometry
            )
            writer.add(key, {"mask": torch.from_numpy(mask)}, {"mask": sample.mask_hash, "size": list(item.bucket)})
            black += [] if mask.any() else [sample.name]
    if black:
        _logger.warning(
            "the mask of %s is black within the crop of the image: all of it counts as background",
            some(sorted(black), 3),
        )
