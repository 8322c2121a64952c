"""Looking for near-duplicates among many images: linear, bounded, remembered, and with the result of comparing all pairs."""

from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sushi_research import randomness
from sushi_research.data import held_out, near_search
from sushi_research.data.buckets import BucketRule
from sushi_research.data.items import make_items
from sushi_research.data.near_duplicates import near_duplicate_groups
from sushi_research.data.samples import Sample, Samples
from sushi_research.data.scan import Scan
from sushi_research.errors import UserError
from sushi_research.fingerprints import content_hash
from sushi_research.remembered import NOTHING_REMEMBERED, Remembered


def fingerprint(seed: int, noise: int = 0) -> int:
    """Of an image that resembles those of the same seed only; those of an odd noise are mirrored."""
    pixels = np.random.default_rng(seed).integers(20, 236, (8, 8, 3))
    pixels += np.random.default_rng((seed, noise)).integers(-4, 5, pixels.shape) * (noise > 0)
    pixels = pixels[:, ::-1] if noise % 2 else pixels
    return int.from_bytes(pixels.astype(np.uint8).tobytes(), "big")


def samples_of(groups: list[int], copies: int = 0, prefix: str = "") -> Samples:
    """Groups of so many images that resemble each other, and `copies` files that equal the first ones."""
    found = []
    for seed, size in enumerate(groups):
        for noise in range(size):
            name = f"{prefix}{seed}-{noise}"
            image = content_hash(name.encode())
            found.append(Sample(name, image, "a caption", 64, 64, 1, bytes, partial(fingerprint, seed, noise)))
    for number, sample in enumerate(found[:copies]):
        found.append(Sample(f"copy {number}", sample.image_hash, "", 64, 64, 1, bytes, sample.load_fingerprint))
    return Samples.of(found)


def chosen(samples: Samples, share: float | int, eligible=None, remembered=NOTHING_REMEMBERED) -> set[str]:
    eligible = np.ones(len(samples), bool) if eligible is None else eligible
    return set(samples.take(near_search.choose(samples, eligible, share, remembered).chosen).names.to_pylist())


@settings(max_examples=25)
@given(st.lists(st.integers(1, 3), min_size=4, max_size=40), st.integers(0, 3), st.randoms(use_true_random=False))
def test_the_choice_is_that_of_all_pairs_while_images_resemble_no_other(groups, copies, random):
    samples = samples_of(groups, copies)
    eligible = np.array([random.random() < 0.8 for _ in range(len(samples))])
    counts = dict(zip(*np.unique(samples.images, return_counts=True), strict=True))
    of_group = near_duplicate_groups({sample.image_hash: sample.fingerprint for sample in samples})
    is_eligible = dict.fromkeys(counts, True)
    for image, good in zip(samples.images, eligible, strict=True):
        is_eligible[image] &= bool(good)
    alone = sum(
        len(group) == 1 and counts[group[0].encode()] == 1 and is_eligible[group[0].encode()] for group in of_group
    )
    expected = chosen(samples, alone, eligible)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(near_search, "MOST_GROUPED", 0)
        patch.setattr(near_search, "CANDIDATES", 3)
        patch.setattr(near_search, "BLOCK", 7)
        assert chosen(samples, alone, eligible) == expected
        assert len(expected) == alone


def test_images_that_resemble_another_are_not_held_out_of_many(monkeypatch):
    monkeypatch.setattr(near_search, "MOST_GROUPED", 0)
    samples = samples_of([1] * 5 + [2] * 20)
    assert chosen(samples, 1.0) == {f"{seed}-0" for seed in range(5)}
    with pytest.raises(UserError, match="holds out none of the 40 distinct images in photos"):
        held_out.hold_out(Scan("photos", samples_of([2] * 20)), 0.5)


def compared(monkeypatch, function) -> int:
    """How many pairs `function()` compares."""
    pairs, is_near = [], near_search.is_near
    with monkeypatch.context() as patch:
        patch.setattr(near_search, "is_near", lambda a, b: pairs.append(len(a) * len(b)) or is_near(a, b))
        function()
    return sum(pairs)


def test_twice_the_images_are_twice_the_comparisons(monkeypatch):
    monkeypatch.setattr(near_search, "MOST_GROUPED", 0)
    counts = []
    for number in (400, 800):
        samples = samples_of([1] * number)
        counts.append(compared(monkeypatch, lambda samples=samples: chosen(samples, 20)))
    # 20 wanted images are 64 candidates, each with its mirror image, and each finds itself twice.
    assert counts[1] - counts[0] == 2 * 64 * 400
    monkeypatch.setattr(near_search, "MOST_COMPARED", 128)
    assert compared(monkeypatch, lambda: chosen(samples, 1.0)) < 2.1 * 128 * 800
    assert len(chosen(samples, 1.0)) == 128


def test_a_choice_is_remembered_until_the_images_change(monkeypatch, tmp_path):
    for most in (0, 4096):
        monkeypatch.setattr(near_search, "MOST_GROUPED", most)
        remembered, samples = Remembered(tmp_path / str(most)), samples_of([1] * 40 + [2] * 5)
        first = chosen(samples, 0.2, remembered=remembered)
        with monkeypatch.context() as patch:
            for name in ("_all_pairs", "_one_by_one"):
                patch.setattr(near_search, name, lambda *args: pytest.fail("it was chosen again"))
            assert chosen(samples, 0.2, remembered=remembered) == first
        assert chosen(samples, 0.1, remembered=remembered) < first
        # A copy of an image that was held out: it is not alone any more.
        row = samples.names.to_pylist().index(min(first))
        more = Samples.of([*samples, Sample("new", "0" * 32, "", 64, 64, 1, bytes, samples[row].load_fingerprint)])
        assert min(first) not in chosen(more, 0.2, remembered=remembered)


def test_separate_images_are_compared_with_those_that_are_trained_on(monkeypatch, tmp_path):
    training = Scan("photos", samples_of([1] * 30))
    separate = samples_of([2] * 3 + [0] * 30 + [2], prefix="held ")
    found = held_out.require_separate(Scan("held", separate), training, remembered=Remembered(tmp_path))
    assert found == [
        f"the held-out image held {seed}-{noise} looks like the training image {seed}-0"
        for seed in range(3)
        for noise in range(2)
    ]
    monkeypatch.setattr(near_search, "MOST_COMPARED", 2)
    assert held_out.require_separate(Scan("held", separate), training)[2:] == [
        "of the 8 held-out images only 2 were compared with the training images"
    ]
    with pytest.raises(UserError, match=r"also trained on, 3-0 \(trained on as 3-0\), 4-0 .* and 4 more: remove"):
        held_out.require_separate(Scan("held", samples_of([0] * 3 + [1] * 8)), Scan("photos", samples_of([1] * 10)))


def test_measured_training_images_are_a_fixed_choice(monkeypatch, tmp_path):
    samples = samples_of([1] * 30, copies=5)
    items, _ = make_items(samples, BucketRule(resolution=64, min_side=32, max_side=128, step=32))
    first = {}
    for item in sorted(items, key=lambda item: (item.sample.image_hash, item.sample.caption)):
        first.setdefault(item.sample.image_hash, item.sample.name)
    order = sorted(first, key=lambda image: randomness.uniform(0, "measured training image", image))
    but, remembered = set(order[:3]), Remembered(tmp_path)
    for expected, excluded in ((order, set()), (order[3:], but)):
        found = held_out.trained_items(items, 6, excluded, remembered)
        assert [item.sample.name for item in found] == [first[image] for image in expected[:6]]
        assert len(held_out.trained_items(items, 99, excluded, remembered)) == len(expected)
    monkeypatch.setattr(held_out.randomness, "uniform", lambda *args: pytest.fail("it was chosen again"))
    assert held_out.trained_items(items, 6, but, remembered)[0].sample.name == first[order[3]]
    assert len(held_out.trained_items(items, 0, but)) == 0
