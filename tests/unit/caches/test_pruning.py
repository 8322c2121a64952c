"""Pruning: what is needed is still there, bit for bit; what is not needed is gone; nothing is removed that a command uses."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from sushi_research.caches import pruning
from sushi_research.caches.keys import entry_key, packed
from sushi_research.caches.store import Store
from sushi_research.errors import UserError

KEYS = [entry_key(number=number) for number in range(10)]


def open_store(folder: Path) -> Store:
    return Store.open(folder, ("mean",), repair=True)


def fill(folder: Path, numbers: range, max_rows: int = 3) -> None:
    with open_store(folder).writer(max_rows=max_rows) as writer:
        for number in numbers:
            writer.add(KEYS[number], {"mean": torch.full((4, 100), float(number))}, {"number": number})


def prune(folder: Path, numbers: list[int]) -> tuple[int, int, int]:
    """The entries and bytes that were removed, and the shards that were touched."""
    waste = pruning.find_waste(open_store(folder), packed(KEYS[number] for number in numbers))
    pruning.remove_waste([waste])
    return waste.entries, waste.bytes, len(waste.kept)


def require_rows(folder: Path, numbers: list[int]) -> None:
    store = open_store(folder)
    assert len(store) == len(numbers) and store.damaged == []
    for number in numbers:
        tensors, metadata = store.row(KEYS[number])
        assert torch.equal(tensors["mean"], torch.full((4, 100), float(number))) and metadata == {"number": number}


@pytest.mark.parametrize("numbers", [[], [0, 1, 2], [4], [0, 3, 5, 9], [*range(10)]])
def test_what_is_needed_stays_and_the_rest_goes(tmp_path: Path, numbers: list[int]) -> None:
    fill(tmp_path, range(10))
    before = {path.name: path.stat().st_size for path in tmp_path.glob("shard-*")}
    entries, freed, _ = prune(tmp_path, numbers)
    require_rows(tmp_path, numbers)
    assert entries == 10 - len(numbers)
    names = {path.name for path in tmp_path.glob("shard-*")}
    # A shard of which all is needed is not touched; the others become one.
    kept = [row for row in ([0, 1, 2], [3, 4, 5], [6, 7, 8], [9]) if set(row) <= set(numbers)]
    rest = set(numbers) - {number for row in kept for number in row}
    assert len(names) == 2 * (len(kept) + bool(rest)) and len(names & before.keys()) == 2 * len(kept)
    expected = sum(before[name] for name in before if name.endswith(".arrow")) * (10 - len(numbers)) / 10
    assert freed == pytest.approx(expected, rel=0.3, abs=1)  # an estimate: a shard also has its own words
    assert prune(tmp_path, numbers) == (0, 0, 0)


def test_rows_that_two_shards_have_stay_once(tmp_path: Path) -> None:
    """Also if what stays of one shard is what another one was, and so has its name."""
    other = tmp_path / "other"
    fill(tmp_path / "one", range(1))
    fill(other, range(2))
    for path in (tmp_path / "one").glob("shard-*"):
        os.link(path, other / path.name)
    for numbers in ([0, 1], [0]):
        prune(other, numbers)
        require_rows(other, numbers)
        assert len(list(other.glob("shard-*.arrow"))) == 1


def test_a_store_in_use_is_not_pruned_and_one_that_is_pruned_is_not_opened(tmp_path: Path) -> None:
    fill(tmp_path, range(4))
    reader = open_store(tmp_path)
    with pytest.raises(UserError, match=f"{tmp_path} is in use by another command: prune it when that has ended"):
        prune(tmp_path, [0])
    require_rows(tmp_path, [0, 1, 2, 3])
    with reader.alone(), pytest.raises(UserError, match=f"{tmp_path} is being pruned: run the same command again"):
        open_store(tmp_path)
    del reader
    prune(tmp_path, [0])
    require_rows(tmp_path, [0])


def test_an_error_in_the_middle_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, range(10))
    monkeypatch.setattr(pruning, "_SHARD_BYTES", 1)

    def fail_later(*arguments: object) -> Path:
        if len(done) == 1:
            raise OSError(28, "No space left on device")
        done.append(arguments)
        return write_shard(*arguments)

    done: list[tuple] = []
    write_shard = pruning.write_shard
    monkeypatch.setattr(pruning, "write_shard", fail_later)
    with pytest.raises(UserError, match=r"cannot write to .*: No space left on device; free some space"):
        prune(tmp_path, [0, 3, 6])
    store = open_store(tmp_path)
    assert len(store) == 8 and all(KEYS[number] in store for number in (0, 3, 6))


def test_damaged_and_left_files(tmp_path: Path) -> None:
    fill(tmp_path, range(1))
    name = f"shard-{'0' * 32}"
    for suffix in (".arrow", ".json.damaged", ".arrow.damaged"):
        (tmp_path / f"{name}{suffix}").write_bytes(b"1234")
    (tmp_path / "notes.txt").write_text("mine")
    found = [(f"{name}.arrow.damaged", 4), (f"{name}.json.damaged", 4)]
    assert [(path.name, size) for path, size in pruning.leftovers(tmp_path)] == found
    os.utime(tmp_path / f"{name}.arrow", (0, 0))
    assert [(path.name, size) for path, size in pruning.leftovers(tmp_path)] == [(f"{name}.arrow", 4), *found]
