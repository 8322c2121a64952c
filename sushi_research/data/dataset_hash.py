"""The hash that identifies what a run trains on, or what it measures: the images, captions, crops and masks of items."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import astuple

import numpy as np
import pyarrow

from sushi_research.data import colour
from sushi_research.data.items import Item, Items
from sushi_research.data.samples import HASH
from sushi_research.remembered import NOTHING_REMEMBERED, Remembered, columns_hash

# Items whose values are Python objects at the same time.
_AT_A_TIME = 50_000


def dataset_hash(items: Sequence[Item], remembered: Remembered = NOTHING_REMEMBERED) -> str:
    """Hash of the training data: images as they are decoded, captions, repetitions, crop geometries and masks, but not names.

    Of several captions it covers the first. It is computed from every item once, and `remembered` for the same columns.
    """
    if not isinstance(items, Items):
        return _hash(map(_text, items))
    samples = items.samples
    masks = np.zeros(len(samples), HASH) if samples.masks is None else samples.masks
    of_samples = (samples.images, samples.first_captions, samples.converted, samples.sets, masks)
    key = columns_hash(*of_samples, items.rows, items.instances, items.geometries, np.array([colour.RECIPE]))
    columns = remembered.arrays("dataset-hash", key, lambda: {"hash": np.array([_hash(_texts(items, masks))], HASH)})
    return columns["hash"][0].decode()


def _hash(texts: Iterator[str]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for text in texts:
        digest.update(text.encode())
    return digest.hexdigest()


def _text(item: Item) -> str:
    """What is hashed of an item. The values of data without sets, masks and converted colours are as in every version."""
    sample = item.sample
    return _entry(
        *item.identity, sample.caption, astuple(item.geometry), sample.converted, sample.set, sample.mask_hash
    )


def _texts(items: Items, masks: np.ndarray) -> Iterator[str]:
    """`_text` of each item, from the columns."""
    samples = items.samples
    for start in range(0, len(items), _AT_A_TIME):
        part = slice(start, start + _AT_A_TIME)
        rows = items.rows[part]
        yield from map(
            _entry,
            samples.images[rows].astype("U").tolist(),
            items.instances[part].tolist(),
            samples.first_captions.take(pyarrow.array(rows)).to_pylist(),
            map(tuple, items.geometries[part].tolist()),
            samples.converted[rows].tolist(),
            samples.sets[rows].tolist(),
            masks[rows].astype("U").tolist(),
        )


def _entry(
    image: str, instance: int, caption: str, geometry: tuple[int, ...], converted: bool, number: int, mask: str
) -> str:
    extra: list[tuple[str, object]] = [("colour", colour.RECIPE)] if converted else []
    if number:
        extra.append(("set", number))
    if mask:
        extra.append(("mask", mask))
    return repr(((image, instance), caption, geometry, *extra))
