"""Loss weights, masks and targets of a batch, as the sets of its images say."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from sushi_research.caches.mask_entries import MASK_TENSORS, encode_masks, mask_entries, mask_key
from sushi_research.caches.store import Store
from sushi_research.config import SDXLTraining
from sushi_research.config.sets import sets_of
from sushi_research.data.buckets import BucketRule
from sushi_research.data.items import make_items
from sushi_research.data.samples import Sample
from sushi_research.fingerprints import content_hash
from sushi_research.remembered import NOTHING_REMEMBERED, Remembered
from sushi_research.training import set_terms

SETS = sets_of(
    SDXLTraining(
        model={"base": "base"},
        train={"steps": 1},
        masks={"background": 0.25},
        data={
            "sets": [
                {"path": "a", "masks": {"source": "files"}},
                {"path": "b", "masks": {"source": "alpha", "invert": True, "unmasked": 0.5}},
                {"path": "c", "loss_weight": 0.5, "target": "base", "role": "regularisation"},
            ]
        },
    )
)


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def left_half() -> Image.Image:
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    return mask


@pytest.fixture
def items():
    """An item of each set: one with a mask file, one with transparency, one of regularisation."""
    mask, clear = png(left_half()), Image.new("RGB", (64, 64))
    clear.putalpha(left_half())
    image = png(clear)
    files = Sample("1", "01", "", 64, 64, 1, bytes, mask_hash=content_hash(mask), load_mask=lambda: mask)
    hash_of = content_hash(image)
    alpha = Sample("2", hash_of, "", 64, 64, 1, lambda: image, set=1, mask_hash="alpha:2")
    plain = Sample("3", "03", "", 64, 64, 1, bytes, set=2)
    found, _ = make_items([files, alpha, plain], BucketRule(resolution=64, step=32, min_side=32, max_side=128))
    return found.take(np.argsort([item.sample.name for item in found]))


@pytest.fixture
def store(tmp_path, items):
    store = Store.open(tmp_path / "masks", MASK_TENSORS, repair=True)
    # A mask with several uses is one entry.
    twice = items.take(np.array([0, 1, 0, 2]))
    for _ in range(2):  # made, then remembered
        entries = mask_entries([twice, items], Remembered(tmp_path / "remembered"))
        assert sorted(entries.item(number).sample.name for number in range(len(entries))) == ["1", "2"]
        assert entries.bytes == 2 * 8 * 8 * 2
    for rank in range(2):  # each process its share
        encode_masks(store, entries, SETS, rank=rank, world=2)
    assert store.has(entries.keys).all() and len(store) == 2
    return store


def test_sets_give_weights_targets_and_masks(items, store):
    assert set_terms.loss_weights(items, SETS).tolist() == [1, 1, 0.5]
    assert set_terms.learns_base(items, SETS).tolist() == [False, False, True]
    assert set_terms.learns_base(items[:2], SETS) is None
    epoch = next(each for each in range(9) if not set_terms.is_unmasked(0, 0.5, each, items[1]))
    found = set_terms.mask_weights(items, SETS, [epoch] * 3, [False] * 3, store, 0)
    assert found.shape == (3, 1, 8, 8) and found.dtype == torch.float32
    assert (found[0, 0, :, :4] == 1).all() and (found[0, 0, :, 4:] == 0.25).all()
    assert (found[1, 0, :, :4] == 0.25).all() and (found[1, 0, :, 4:] == 1).all()
    assert (found[2] == 1).all()
    mirrored = set_terms.mask_weights(items, SETS, [epoch] * 3, [True] * 3, store, 0)
    assert torch.equal(mirrored, found.flip(-1))
    assert set_terms.mask_weights(items[2:], SETS, [0], [False], store, 0) is None
    assert set_terms.mask_weights(items[2:], SETS, [0], [False], None, 0) is None


def test_some_steps_are_without_the_mask(items, store):
    """By seed, epoch and image; with the probability that is asked for: 3 standard deviations of 1000 draws are 0.047."""
    unmasked = [set_terms.is_unmasked(3, 0.5, epoch, items[1]) for epoch in range(1000)]
    assert abs(np.mean(unmasked) - 0.5) < 0.047
    epoch = unmasked.index(True)
    assert set_terms.mask_weights(items[1:], SETS, [epoch] * 2, [False] * 2, store, 3) is None


def test_the_key_of_a_mask_is_its_content_and_its_crop(items):
    item = items[0]
    assert mask_key(item) != mask_key(replace(item, geometry=replace(item.geometry, crop_left=8)))
    assert mask_key(item) != mask_key(replace(item, sample=replace(item.sample, mask_hash="02")))
    assert mask_key(item) == mask_key(replace(item, sample=replace(item.sample, image_hash="02"), instance=1))


@pytest.mark.parametrize(
    ("left", "invert", "told"), [(32, False, True), (0, False, False), (32, True, False), (0, True, True)]
)
def test_a_crop_that_is_all_background_is_told(tmp_path, items, caplog, left, invert, told):
    """The left half of the image is white in its mask; with masks.invert that is the background."""
    store = Store.open(tmp_path / "masks", MASK_TENSORS, repair=True)
    half = items.take(np.array([0]))
    half.geometries[:, [5, 7]] = left, 32
    sets = [replace(SETS[0], masks=SETS[0].masks.model_copy(update={"invert": invert}))]
    encode_masks(store, mask_entries([half], NOTHING_REMEMBERED), sets)
    assert ("by the mask of 1, all of the image's crop counts as background" in caplog.text) == told
