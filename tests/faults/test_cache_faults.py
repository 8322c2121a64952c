"""The cache store when things go wrong: damage is found, left out and made again; what is whole is never lost."""

from __future__ import annotations

import errno
import itertools
import json
import logging
import multiprocessing
import os
import random
import re
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
import torch
from cases import case

from sushi_research.caches import shards
from sushi_research.caches.keys import entry_key
from sushi_research.caches.store import Store
from sushi_research.errors import UserError
from sushi_research.temporaries import temporary_file

ROWS = 8
ROWS_PER_SHARD = 2


def row(number: int) -> dict[str, torch.Tensor]:
    return {"hidden": torch.full((2, 300), float(number))}


def open_store(folder: Path, *, repair: bool = True) -> Store:
    return Store.open(folder, ("hidden",), repair=repair)


def fill(folder: Path, *, rows: int = ROWS, rows_per_shard: int = ROWS_PER_SHARD, repair: bool = True) -> Store:
    """Add what the store lacks, as the filling of a cache does."""
    store = open_store(folder, repair=repair)
    with store.writer(max_rows=rows_per_shard) as writer:
        for number in range(rows):
            if entry_key(number=number) not in store:
                writer.add(entry_key(number=number), row(number), {"number": number})
    return store


def assert_whole(store: Store) -> list[int]:
    """Every row that the store says it has is the right one; returns the rows' numbers."""
    assert store.damaged == []
    there = (number for number in range(10_000) if entry_key(number=number) in store)
    numbers = list(itertools.islice(there, len(store)))
    assert len(store) == len(numbers)
    for number in numbers:
        assert torch.equal(store.get(entry_key(number=number))["hidden"], row(number)["hidden"])
    return numbers


def one_shard(folder: Path) -> Path:
    """The path of the first shard's Arrow file."""
    return min(folder.glob("shard-*.arrow"))


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0b100
    path.write_bytes(data)


def cut_in_the_middle(path: Path) -> str:
    size = path.stat().st_size
    os.truncate(path, size // 2)
    return f"it has {size // 2} bytes and should have {size}"


def delete_shard(path: Path) -> str:
    path.unlink()
    return "the file is missing"


def cut_manifest(path: Path) -> str:
    manifest = path.with_suffix(".json")
    os.truncate(manifest, manifest.stat().st_size // 2)
    return "its manifest is not what was written"


def empty_manifest(path: Path) -> str:
    os.truncate(path.with_suffix(".json"), 0)
    return "its manifest is not what was written"


def edit_manifest(path: Path) -> str:
    manifest = path.with_suffix(".json")
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"rows": ROWS_PER_SHARD + 1}))
    return "its manifest is not what was written"


def manifest_of_another_type(path: Path) -> str:
    path.with_suffix(".json").write_text("[]")
    return "its manifest is not what was written"


DAMAGES = [
    cut_in_the_middle,
    delete_shard,
    cut_manifest,
    empty_manifest,
    edit_manifest,
    manifest_of_another_type,
]


@pytest.mark.parametrize("repair", [True, False], ids=["main_process", "other_process"])
def test_a_damaged_shard_is_skipped_named_and_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, repair: bool
) -> None:
    for damage in DAMAGES:
        with case(damage.__name__):
            require_made_again(tmp_path / damage.__name__, caplog, damage, repair)


def require_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], str], repair: bool
) -> None:
    caplog.clear()
    fill(tmp_path)
    shard = one_shard(tmp_path)
    reason = damage(shard)
    with caplog.at_level(logging.WARNING):
        store = open_store(tmp_path, repair=repair)
        store.refresh()  # does not say it twice
    assert store.damaged == [(shard.stem, reason)]
    assert [record.getMessage() for record in caplog.records] == [
        f"{shard} is damaged ({reason}): it is skipped and its entries are made again"
    ]
    assert len(store) == ROWS - ROWS_PER_SHARD
    assert shard.with_suffix(".json").exists() is not repair
    assert Path(f"{shard.with_suffix('.json')}.damaged").exists() is repair
    assert Path(f"{shard}.damaged").exists() is (repair and damage is not delete_shard)

    fill(tmp_path, repair=repair)
    assert assert_whole(open_store(tmp_path)) == list(range(ROWS))


def test_a_shard_without_its_manifest_does_not_count(tmp_path: Path) -> None:
    fill(tmp_path)
    one_shard(tmp_path).with_suffix(".json").unlink()
    assert len(assert_whole(open_store(tmp_path))) == ROWS - ROWS_PER_SHARD
    fill(tmp_path)
    assert assert_whole(open_store(tmp_path)) == list(range(ROWS))


def test_a_flipped_bit_gives_no_wrong_row(tmp_path: Path) -> None:
    """In every ninth byte, and so in each bit of a byte in turn. Arrow's own words may change: nothing reads them."""
    fill(tmp_path, rows=1)
    key, names = entry_key(number=0), sorted(path.name for path in tmp_path.iterdir())
    noticed = {".arrow": 0, ".json": 0}
    for suffix in noticed:
        path = one_shard(tmp_path).with_suffix(suffix)
        whole = path.read_bytes()
        for position in range(0, len(whole), 9):
            data = bytearray(whole)
            data[position] ^= 1 << position % 8
            path.write_bytes(data)
            store = open_store(tmp_path, repair=False)
            try:
                right = key in store and torch.equal(store.get(key)["hidden"], row(0)["hidden"])
                assert right or store.damaged, f"{suffix}, byte {position}"
            except UserError as error:
                assert "the bytes of row 0 are not those that were written" in str(error)
            noticed[suffix] += bool(store.damaged)
            for name in names:  # what was set aside
                if (tmp_path / f"{name}.damaged").exists():
                    os.replace(tmp_path / f"{name}.damaged", tmp_path / name)
        path.write_bytes(whole)
        tensor_bytes = row(0)["hidden"].nbytes
        assert noticed[suffix] >= (len(whole) if suffix == ".json" else tensor_bytes) // 9


@pytest.mark.parametrize("writable", [True, False])
def test_a_damaged_row_is_an_error_once_and_then_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writable: bool
) -> None:
    fill(tmp_path)
    shard = one_shard(tmp_path)
    flip_bit(shard)
    store = open_store(tmp_path)
    assert len(store) == ROWS and store.damaged == []
    if not writable:
        monkeypatch.setattr(os, "replace", fail_with(errno.EROFS))
    reads = [store.get, store.get]
    with pytest.raises(UserError) as caught:
        for number in range(ROWS):
            for read in reads:
                assert torch.equal(read(entry_key(number=number))["hidden"], row(number)["hidden"])
    reason = "the bytes of row [01] are not those that were written"
    advice = "" if writable else "delete it and its .json, and "
    assert re.fullmatch(
        rf"the cache file {shard} is damaged \({reason}\): {advice}run the same command again, which makes its entries again "
        "and goes on from the last checkpoint",
        str(caught.value),
    )
    assert shard.exists() is not writable
    monkeypatch.undo()
    if not writable:
        shard.unlink(), shard.with_suffix(".json").unlink()
    fill(tmp_path)
    assert assert_whole(open_store(tmp_path)) == list(range(ROWS))


def test_a_shard_that_is_truncated_or_removed_while_it_is_in_use(tmp_path: Path) -> None:
    for change, reason in ((cut_in_the_middle, r"is damaged \(it was truncated\)"), (delete_shard, "was removed")):
        folder = tmp_path / change.__name__
        fill(folder, rows=ROWS_PER_SHARD)
        store = open_store(folder)
        change(one_shard(folder))
        with pytest.raises(UserError, match=rf"{reason}.*: run the same command again"):
            for number in reversed(range(ROWS_PER_SHARD)):
                store.get(entry_key(number=number))


def test_a_cut_at_a_record_batch_is_noticed(tmp_path: Path) -> None:
    fill(tmp_path, rows=100, rows_per_shard=100)
    path = one_shard(tmp_path)
    with pyarrow.OSFile(str(path)) as file:
        pyarrow.ipc.open_stream(file).read_next_batch()
        boundary = file.tell()
    size = path.stat().st_size
    os.truncate(path, boundary)
    from datasets import Dataset

    assert len(Dataset.from_file(str(path))) == 32  # Arrow alone sees nothing wrong
    store = open_store(tmp_path, repair=False)
    assert store.damaged == [(path.stem, f"it has {boundary} bytes and should have {size}")]


def test_a_shard_made_again_by_another_process_is_taken_up(tmp_path: Path) -> None:
    fill(tmp_path)
    cut_in_the_middle(one_shard(tmp_path))
    other = open_store(tmp_path, repair=False)
    assert len(other) == ROWS - ROWS_PER_SHARD
    fill(tmp_path)  # the same rows, and so a shard of the same name
    other.refresh()
    assert len(other) == ROWS
    assert assert_whole(open_store(tmp_path)) == list(range(ROWS))


def fail_with(code: int) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


def test_a_sector_that_cannot_be_read_is_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, rows=ROWS_PER_SHARD)
    shard = one_shard(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shards, "read_regular", fail_with(errno.EIO))
        store = open_store(tmp_path, repair=False)
        assert store.damaged == [(shard.stem, "the disk cannot read it: Input/output error")]
    store = open_store(tmp_path)
    monkeypatch.setattr(shards, "_read_at", fail_with(errno.EIO))
    with pytest.raises(
        UserError, match=rf"{shard} is damaged \(the disk cannot read it: Input/output error\): run the"
    ):
        store.get(entry_key(number=0))
    assert Path(f"{shard}.damaged").exists()


def test_a_file_that_may_not_be_read_is_not_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, rows=ROWS_PER_SHARD)
    shard = one_shard(tmp_path)
    for code in (errno.EACCES, errno.EMFILE):
        with monkeypatch.context() as patch:
            patch.setattr(shards, "read_regular", fail_with(code))
            with pytest.raises(UserError, match=rf"{shard.stem}.json cannot be read \({os.strerror(code)}\)"):
                open_store(tmp_path)
        store = open_store(tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(shards, "_read_at", fail_with(code))
            with pytest.raises(UserError, match=rf"{shard} cannot be read \({os.strerror(code)}\)"):
                store.get(entry_key(number=0))
    assert len(assert_whole(open_store(tmp_path))) == ROWS_PER_SHARD


def test_a_folder_that_may_not_be_listed_is_not_an_empty_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path)
    monkeypatch.setattr(Path, "iterdir", fail_with(errno.EACCES))
    with pytest.raises(UserError, match=rf"the cache folder {tmp_path} cannot be used \(Permission denied\)"):
        open_store(tmp_path, repair=False)


def test_a_read_only_folder_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path)
    shard = one_shard(tmp_path)
    reason = cut_in_the_middle(shard)
    monkeypatch.setattr(os, "replace", fail_with(errno.EROFS))
    store = open_store(tmp_path)
    assert store.damaged == [(shard.stem, reason)]
    assert len(store) == ROWS - ROWS_PER_SHARD
    assert shard.exists()


def test_a_shard_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, rows=ROWS_PER_SHARD)
    before = sorted(tmp_path.iterdir())
    for function, code, advice in (
        ("fsync", errno.ENOSPC, "free some space there"),
        ("fsync", errno.EDQUOT, "free some space there"),
        ("replace", errno.ENOSPC, "free some space there"),
        ("replace", errno.EROFS, "make that folder writable"),
        ("replace", errno.EACCES, "make that folder writable"),
    ):
        with case(f"{function}, {os.strerror(code)}"):
            with monkeypatch.context() as patch:
                patch.setattr(os, function, fail_with(code))
                with pytest.raises(UserError) as caught:
                    fill(tmp_path)
            # The shard that failed, and what was added until the writer's thread said so.
            lost = str(caught.value).split()[0]
            assert lost in ("2", "3", "4")
            assert str(caught.value) == (
                f"{lost} new entries cannot be written to the cache folder {tmp_path} ({os.strerror(code)}): "
                f"{advice} or choose another folder; earlier entries are kept"
            )
            assert caught.value.__cause__.__context__ is None, "the end of the with-block tried once more"
            assert sorted(tmp_path.iterdir()) == before
    fill(tmp_path)
    assert assert_whole(open_store(tmp_path)) == list(range(ROWS))


def in_a_process(function: Callable[..., None], *arguments: object) -> int:
    """The exit code of a process that runs the function: minus the signal that ended it."""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode


def fill_with_little_room(folder: Path, room: int, action: signal.Handlers) -> None:
    """Fill a store where no file may be larger than `room` bytes, by the kernel's own limit."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    signal.signal(signal.SIGXFSZ, action)
    try:
        fill(folder)
    except UserError as error:
        assert "(File too large): free some space there or choose another folder" in str(error)
        os._exit(2)


def rooms(folder: Path) -> list[int]:
    """Sizes up to that of a shard, its first and its last byte among them."""
    fill(folder)
    size = one_shard(folder).stat().st_size
    return [0, 1, 100, size // 2, size - 100, size - 1]


def test_a_disk_that_fills_up_anywhere_in_a_shard(tmp_path: Path) -> None:
    for room in rooms(tmp_path / "whole"):
        folder = tmp_path / str(room)
        assert in_a_process(fill_with_little_room, folder, room, signal.SIG_IGN) == 2
        assert list(folder.iterdir()) == []


def test_a_process_killed_anywhere_in_a_shard(tmp_path: Path) -> None:
    for room in rooms(tmp_path / "whole"):
        folder = tmp_path / str(room)
        assert in_a_process(fill_with_little_room, folder, room, signal.SIG_DFL) == -signal.SIGXFSZ
        (torn,) = folder.iterdir()
        assert torn.name.startswith(".shard.arrow.") and torn.stat().st_size == room
        assert assert_whole(open_store(folder)) == []
        assert list(folder.iterdir()) == []


def fill_until_step(folder: Path, steps: int) -> None:
    """Fill a store and be killed just before one of the steps that sync or rename a file."""
    left = steps

    def counted(original: Callable[..., None]) -> Callable[..., None]:
        def step(*arguments: object) -> None:
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            original(*arguments)

        return step

    os.fsync, os.replace = counted(os.fsync), counted(os.replace)
    fill(folder)


@pytest.mark.slow
def test_a_process_killed_between_any_two_steps(tmp_path: Path) -> None:
    killed = 0
    found = set()
    while in_a_process(fill_until_step, tmp_path / str(killed), killed) == -signal.SIGKILL:
        folder = tmp_path / str(killed)
        rows = assert_whole(open_store(folder))
        assert len(rows) % ROWS_PER_SHARD == 0, "a shard is there whole or not at all"
        assert rows == list(range(len(rows)))
        assert list(folder.glob(".*")) == []
        found.add(len(rows))
        assert fill(folder).damaged == []
        assert assert_whole(open_store(folder)) == list(range(ROWS))
        killed += 1
    # Per shard: sync both files, then rename and sync the folder for each, and sync the list of shards and the folder. The last
    # process was not killed.
    assert killed == 8 * ROWS // ROWS_PER_SHARD
    assert found == {0, 2, 4, 6, 8}


@pytest.mark.slow
def test_a_process_killed_at_random_moments(tmp_path: Path) -> None:
    generator = random.Random(0)
    held = 0
    for _ in range(8):
        process = multiprocessing.get_context("fork").Process(target=fill, args=(tmp_path,), kwargs={"rows": 10_000})
        process.start()
        while len(list(tmp_path.glob("*.json"))) * ROWS_PER_SHARD <= held:
            assert process.is_alive()
            time.sleep(0.001)
        time.sleep(generator.uniform(0, 0.02))
        process.kill()
        process.join(120)
        assert process.exitcode == -signal.SIGKILL
        rows = assert_whole(open_store(tmp_path))
        # At least: the manifest that was waited for may have been a temporary one, gone with its writer.
        assert rows == list(range(len(rows))) and len(rows) >= held
        assert list(tmp_path.glob(".*")) == []
        held = len(rows)
    assert held > 0


def test_only_what_dead_writers_left_is_removed(tmp_path: Path) -> None:
    fill(tmp_path)
    for name in ("shard-aaaa.arrow", "shard-bbbb.arrow.damaged", ".writing-by-hand.arrow", "notes.txt"):
        (tmp_path / name).write_bytes(b"half a shard")
    kept = sorted(tmp_path.iterdir())
    left = tmp_path / ".shard.arrow.0123abcd.tmp"
    left.write_bytes(b"half a shard")
    with temporary_file(tmp_path / "shard.arrow") as (_, mine):
        # Entering it has removed what the dead writer left.
        assert sorted(tmp_path.iterdir()) == sorted([*kept, mine])
        left.write_bytes(b"half a shard")
        open_store(tmp_path, repair=False)
        assert left.exists()
        open_store(tmp_path, repair=True)
        assert sorted(tmp_path.iterdir()) == sorted([*kept, mine])
        mine.unlink()


def test_leftovers_in_a_read_only_folder_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path)
    left = tmp_path / ".shard.arrow.0123abcd.tmp"
    left.write_bytes(b"half a shard")
    monkeypatch.setattr(os, "unlink", fail_with(errno.EROFS))
    assert len(assert_whole(open_store(tmp_path))) == ROWS
    assert left.exists()
