"""A store whose shards are known is opened without reading their manifests; what has changed is read again."""

import pytest
import torch

from sushi_research.caches import store as stores
from sushi_research.caches.index import Index
from sushi_research.caches.keys import entry_key, hex_digits, packed
from sushi_research.caches.store import Store
from sushi_research.remembered import Remembered


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """A function that opens a store and returns it with the names of the manifests that were read."""

    def run():
        read = []
        monkeypatch.setattr(
            stores, "read_manifest", lambda path, tensors: read.append(path.name) or original(path, tensors)
        )
        return Store.open(tmp_path / "a_store", ("mean",), repair=True, remembered=Remembered(tmp_path / "r")), read

    original = stores.read_manifest
    return run


def add(store: Store, *numbers: int) -> None:
    with store.writer() as writer:
        for number in numbers:
            writer.add(entry_key(number=number), {"mean": torch.full((2,), float(number))}, {})


def test_manifests_of_known_shards_are_not_read(opened):
    add(opened()[0], 1, 2)
    assert len(opened()[1]) == 1
    store, read = opened()
    assert read == [] and len(store) == 2
    assert store.get(entry_key(number=2))["mean"].tolist() == [2.0, 2.0]
    add(store, 3)
    assert len(opened()[1]) == 2  # another set of shards is another index
    assert opened()[1] == [] and len(opened()[0]) == 3


def test_a_file_of_another_size_is_found(opened, tmp_path):
    add(opened()[0], 1)
    opened()
    [file] = (tmp_path / "a_store").glob("*.arrow")
    file.write_bytes(file.read_bytes()[:-8])
    store, read = opened()
    assert len(read) == 1 and len(store) == 0 and len(store.damaged) == 1


def test_keys_that_share_their_first_half_are_told_apart():
    keys = packed([half + rest for half in ("a" * 16, "b" * 16) for rest in ("0" * 16, "1" * 16, "0f" * 8)])
    index = Index().with_shards([(0, keys[[0, 1, 3]])])
    found = index.find(keys)
    assert [hex_digits(index.keys)[place] if place >= 0 else None for place in found] == [
        hex_digits(keys)[number] if number in (0, 1, 3) else None for number in range(6)
    ]
