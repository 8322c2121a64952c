"""What the caches do at each start does not grow with the rows of a data set, as far as Python's function calls count it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch

from sushi_research.caches import latent_entries as entries_module
from sushi_research.caches.caches import Caches
from sushi_research.caches.keys import hex_digits
from sushi_research.caches.latent_entries import latent_entries
from sushi_research.caches.store import Store
from sushi_research.data.items import Items
from sushi_research.data.samples import Samples
from sushi_research.fingerprints import content_hash
from sushi_research.remembered import Remembered

SIZES = (200, 400)


def calls(function: Callable[..., object], *arguments: object) -> int:
    """The Python and C functions that are called."""
    count = 0

    def note(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        function(*arguments)
    finally:
        sys.setprofile(None)
    return count


def make_items(count: int) -> Items:
    hashes = [content_hash(str(number).encode()) for number in range(count)]
    columns = {name: np.ones(count, np.int32) for name in ("widths", "heights", "repeats")}
    samples = Samples.of([])
    samples = Samples(
        **{name: getattr(samples, name) for name in samples.__dataclass_fields__}
        | columns
        | {"images": np.array(hashes, "S32"), "converted": np.zeros(count, bool)}
    )
    geometries = np.tile(np.array([64, 64, 64, 64, 0, 0, 64, 64], np.int32), (count, 1))
    geometries[:, 5] = np.arange(count) % 3
    return Items(samples, np.arange(count), np.zeros(count, np.int32), geometries)


@pytest.fixture(scope="module")
def filled(tmp_path_factory) -> dict[int, tuple[Items, Path]]:
    """Items, and a folder with their image cache in four shards, by the number of items."""
    found = {}
    for count in SIZES:
        items, folder = make_items(count), tmp_path_factory.mktemp("cache")
        entries = latent_entries([(items, False)], "v", torch.float32)
        with Store.open(folder, ("mean",), repair=True).writer(max_rows=count // 4) as writer:
            for key in hex_digits(entries.keys):
                writer.add(key, {"mean": torch.zeros(1)}, {})
        found[count] = items, folder
    return found


def test_opening_a_store_takes_as_many_calls_for_twice_the_rows(filled):
    def open_store(count: int) -> None:
        assert len(Store.open(filled[count][1], ("mean",), repair=True)) == count

    open_store(SIZES[0])
    few, many = (calls(open_store, count) for count in SIZES)
    assert abs(many - few) < 20 < few


def test_keys_are_hashed_once_and_then_found_with_as_many_calls_for_twice_the_rows(filled, tmp_path, monkeypatch):
    hashed = []
    digest = entries_module.digest
    monkeypatch.setattr(entries_module, "digest", lambda data: hashed.append(data) or digest(data))
    for count, (items, _) in filled.items():
        hashed.clear()
        latent_entries([(items, False)], "v", torch.float32, Remembered(tmp_path / str(count)))
        assert len(hashed) == count

    def missing(count: int) -> None:
        items, _ = filled[count]
        entries = latent_entries([(items, False)], "v", torch.float32, Remembered(tmp_path / str(count)))
        assert not len(entries.take(~stores[count].has(entries.keys))) and entries.bytes

    stores = {count: Store.open(folder, ("mean",), repair=True) for count, (_, folder) in filled.items()}
    hashed.clear()
    few, many = (calls(missing, count) for count in SIZES)
    assert not hashed and abs(many - few) < 20 < few


def test_captions_are_found_with_as_many_calls_for_twice_the_rows(tmp_path):
    store = Store.open(tmp_path / "text", ("hidden",), repair=True)
    counts = []
    for count in SIZES:
        caches = Caches(store, store, "v", torch.float32, ("e",), {}, remembered=Remembered(tmp_path / "remembered"))
        captions = pyarrow.array([f"caption {number}" for number in range(count)], pyarrow.large_string())
        assert len(caches.missing_captions(captions)) == count
        counts.append(calls(caches.missing_captions, captions))
    assert abs(counts[1] - counts[0]) < 20 < counts[0]
