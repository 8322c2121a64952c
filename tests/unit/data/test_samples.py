"""The items of an epoch follow from content alone, and nothing is lost on the way from samples to items."""

import random
from dataclasses import replace

import numpy as np
import pytest

from sushi_research.data.buckets import BucketRule
from sushi_research.data.dataset_hash import dataset_hash
from sushi_research.data.items import make_items
from sushi_research.data.samples import Sample, Samples
from sushi_research.remembered import Remembered

RULE = BucketRule(resolution=64, step=32, min_side=32, max_side=128)


def sample(name: str, image: str, caption: str = "a cat", size: tuple[int, int] = (64, 64), repeats: int = 1) -> Sample:
    return Sample(name, image, caption, *size, repeats, load=bytes)


SAMPLES = [
    sample("b.png", "11", size=(130, 70)),
    sample("a.png", "22", "a dog", repeats=3),
    sample("c.png", "22", "a cat"),
    sample("d.png", "00"),
]


def test_each_repetition_is_an_item_of_its_own():
    items, problems = make_items(SAMPLES, RULE)
    assert problems == []
    # "22" is there as two samples: their instances must not meet, or two of its items would share their noise.
    assert [(item.sample.name, item.instance) for item in items] == [
        ("d.png", 0),
        ("b.png", 0),
        ("c.png", 0),
        ("a.png", 1),
        ("a.png", 2),
        ("a.png", 3),
    ]
    assert len({item.identity for item in items}) == 6
    assert items[3].identity == ("22", 1)


def test_a_bucket_is_height_then_width():
    items, _ = make_items(SAMPLES, RULE)
    assert [item.bucket for item in items[:2]] == [(64, 64), (32, 96)]


def test_neither_names_nor_the_order_of_the_scan_matter():
    items, _ = make_items(SAMPLES, RULE)
    moved = [replace(each, name=f"sub/{each.name}") for each in SAMPLES]
    random.Random(0).shuffle(moved)
    again, _ = make_items(moved, RULE)
    assert [item.identity for item in again] == [item.identity for item in items]
    assert dataset_hash(again) == dataset_hash(items)


def test_a_sample_too_small_for_any_bucket_is_a_problem_with_its_name():
    items, problems = make_items([*SAMPLES, sample("tiny.png", "33", size=(20, 90))], RULE)
    assert len(items) == 6
    assert [problem.name for problem in problems] == ["tiny.png"]
    assert "20x90" in problems[0].reason


@pytest.mark.parametrize(
    "change",
    [{"image_hash": "44"}, {"caption": "a fish"}, {"repeats": 2}, {"width": 100}, {"converted": True}],
    ids=lambda change: [*change][0],
)
def test_the_hash_sees_what_is_trained_on(change):
    before, _ = make_items(SAMPLES, RULE)
    after, _ = make_items([*SAMPLES[:-1], replace(SAMPLES[-1], **change)], RULE)
    assert dataset_hash(after) != dataset_hash(before)


def test_the_hash_sees_the_crop_geometry():
    wide = BucketRule(resolution=64, step=16, min_side=32, max_side=128)
    assert dataset_hash(make_items(SAMPLES, wide)[0]) != dataset_hash(make_items(SAMPLES, RULE)[0])


def test_the_hash_of_the_same_data_is_the_same_in_every_version():
    """It is stored in runs, provenance and adapter files: a change of it is a change of format (docs/formats.md)."""
    assert dataset_hash(make_items(SAMPLES, RULE)[0]) == "82448d2c3ad9227df8d4f7250fe58428"


def test_the_hash_of_columns_is_that_of_their_items_and_is_remembered(tmp_path, monkeypatch):
    others = [
        replace(SAMPLES[0], set=2, mask_hash="5" * 32, lines=(SAMPLES[0].caption, "x")),
        replace(SAMPLES[1], converted=True, caption="it's \u5bff\u53f8"),
    ]
    items, _ = make_items([*SAMPLES, *others], RULE)
    remembered = Remembered(tmp_path)
    expected = dataset_hash(list(items))
    monkeypatch.setattr("sushi_research.data.dataset_hash._AT_A_TIME", 3)
    assert dataset_hash(items, remembered) == expected
    monkeypatch.setattr("sushi_research.data.dataset_hash._texts", None)  # it is not computed again
    assert dataset_hash(items, remembered) == expected


def test_columns_give_the_samples_that_they_were_made_of():
    other = replace(
        SAMPLES[0],
        name="z.png",
        caption="the first",
        lines=("a", "b"),
        set=1,
        load_fingerprint=lambda: 1 << 1500,
        converted=True,
    )
    columns = Samples.of([*SAMPLES, other])
    assert list(columns) == [*SAMPLES, other] and columns[4].fingerprint == 1 << 1500
    assert list(columns.take(np.array([4, 0]))) == [other, SAMPLES[0]]
    parts = columns.take(columns.sets == 1), columns.take(columns.sets == 0)
    assert list(Samples.concat(parts)) == [other, *SAMPLES]
    assert [columns[index].name for index in columns.by_content()] == ["d.png", "b.png", "z.png", "c.png", "a.png"]
    with pytest.raises(IndexError):
        columns[5]


def test_columns_read_the_bytes_of_their_source():
    columns = Samples.of([replace(SAMPLES[0], load=lambda: b"first"), replace(SAMPLES[1], load=lambda: b"second")])
    assert [each.load() for each in columns.take(np.array([1, 0]))] == [b"second", b"first"]


def test_items_as_columns_have_buckets():
    items, _ = make_items(SAMPLES, RULE)
    assert [items.buckets[number] for number in items.bucket_ids] == [item.bucket for item in items]
    assert [item.identity for item in items[::2]] == [item.identity for item in items][::2]
