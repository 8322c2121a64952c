"""What the sets of images say about the loss of their images: its weight, its mask, and its target."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sushi_research import randomness
from sushi_research.caches.mask_entries import mask_key
from sushi_research.caches.store import Store
from sushi_research.config.sets import ResolvedSet
from sushi_research.data import masks
from sushi_research.data.items import Item


def loss_weights(items: Sequence[Item], sets: Sequence[ResolvedSet]) -> torch.Tensor:
    """[B] float32: the loss weight of each item's set."""
    return torch.tensor([sets[item.sample.set].loss_weight for item in items], dtype=torch.float32)


def roles(items: Sequence[Item], sets: Sequence[ResolvedSet]) -> torch.Tensor | None:
    """[B] int64: 1 for each regularisation image, 0 for others; None if no set has any."""
    if not any(each.is_regularisation for each in sets):
        return None
    return torch.tensor([int(sets[item.sample.set].is_regularisation) for item in items])


def learns_base(items: Sequence[Item], sets: Sequence[ResolvedSet]) -> torch.Tensor | None:
    """[B] bool: whether the target of each item is the base's own prediction; None if that of no item is."""
    found = [sets[item.sample.set].target == "base" for item in items]
    return torch.tensor(found) if any(found) else None


def is_unmasked(seed: int, probability: float, epoch: int, item: Item) -> bool:
    """Whether an item is used without its mask in an epoch."""
    return probability > 0 and randomness.uniform(seed, "unmasked", epoch, *item.identity) < probability


def mask_weights(
    items: Sequence[Item],
    sets: Sequence[ResolvedSet],
    epochs: Sequence[int],
    flips: Sequence[bool],
    store: Store | None,
    seed: int,
) -> torch.Tensor | None:
    """The weight of each latent in the loss, [B, 1, h, w] float32, of items of one bucket; None if no item is masked.

    An item without a mask, or that is used without it in its epoch, has weight 1 everywhere.
    """
    used = []
    for item, epoch, flip in zip(items, epochs, flips, strict=True):
        own = sets[item.sample.set].masks
        masked = item.sample.mask_hash and not is_unmasked(seed, own.unmasked, epoch, item)
        used.append((mask_key(item), own, flip) if masked else None)
    if store is None or not any(used):
        return None
    rows = iter(store.get_many([each[0] for each in used if each]))
    weights = []
    for item, each in zip(items, used, strict=True):
        if each is None:
            height, width = item.bucket
            weights.append(torch.ones(1, height // masks.SCALE, width // masks.SCALE))
            continue
        _, own, flip = each
        mask = next(rows)["mask"].numpy()
        found = masks.loss_weights(mask, own.background, invert=own.invert, flip=flip)
        weights.append(torch.from_numpy(found))
    return torch.stack(weights)
