"""The cache store: what goes in comes out bit for bit, whoever wrote it and in however many shards."""

from __future__ import annotations

import errno
import json
import multiprocessing
import pickle
import shutil
import threading
import warnings
from pathlib import Path

import psutil
import pytest
import torch

from sushi_research.caches import order as cache_order
from sushi_research.caches import shards as cache_shards
from sushi_research.caches import store as cache
from sushi_research.caches.keys import entry_key, packed
from sushi_research.caches.store import Store
from sushi_research.errors import UserError
from sushi_research.files import fsync_file
from sushi_research.fingerprints import content_hash

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.int64]
SHAPES = [(4, 3, 5), (1,), (), (0,), (2, 0, 3)]


A, B = entry_key(name="a"), entry_key(name="b")


def row(number: int) -> dict[str, torch.Tensor]:
    """A row of the kind that latents have, different for each number."""
    return {"mean": torch.full((4, 2, 3), number, dtype=torch.float16), "std": torch.arange(6.0) + number}


def open_latents(folder: Path, *, repair: bool = True) -> Store:
    return Store.open(folder, ("mean", "std"), repair=repair)


def fill(folder: Path, numbers: range, **limits: float) -> Store:
    store = open_latents(folder)
    with store.writer(**limits) as writer:
        for number in numbers:
            writer.add(entry_key(number=number), row(number), {"number": number})
    return store


def assert_rows(store: Store, numbers: range) -> None:
    """The store holds these rows and no others."""
    assert len(store) == len(numbers)
    for number in numbers:
        key = entry_key(number=number)
        assert key in store
        assert store.metadata(key) == {"number": number}
        for name, tensor in row(number).items():
            assert_same_bits(store.get(key)[name], tensor)


def assert_same_bits(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert torch.equal(found.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))


def shard_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("shard-*.arrow"))


def test_entry_key_is_stable() -> None:
    # From `printf '{"flip":false,"image":"ab12","scale":0.5,"size":[768,512]}' | b2sum -l 128`. Another value here
    # makes every cache of every user worthless: it must not happen by accident.
    assert entry_key(image="ab12", size=(768, 512), flip=False, scale=0.5) == "99dbc219658efbaab75650df3f806d7c"


def test_entry_key_depends_on_every_part_and_not_on_their_order() -> None:
    key = entry_key(image="ab12", size=[768, 512], flip=False)
    assert entry_key(flip=False, size=(768, 512), image="ab12") == key
    others = [
        entry_key(image="ab13", size=[768, 512], flip=False),
        entry_key(image="ab12", size=[512, 768], flip=False),
        entry_key(image="ab12", size=[768, 512], flip=True),
        entry_key(image="ab12", size=[768, 512], flip=None),
        entry_key(image="ab12", size=[768, 512]),
    ]
    assert len({key, *others}) == 6


def test_entry_key_refuses_what_has_no_one_spelling() -> None:
    for value, error in (
        (float("nan"), ValueError),
        (float("inf"), ValueError),
        (Path("a"), TypeError),
        ({1, 2}, TypeError),
    ):
        with pytest.raises(error):
            entry_key(value=value)
            pytest.fail(f"{value!r} was accepted")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_come_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [(torch.randn(shape, generator=generator) * 1000).to(dtype) for shape in SHAPES]
    if dtype.is_floating_point:
        limits = torch.finfo(dtype)
        tensors.append(torch.tensor([limits.max, limits.min, limits.smallest_normal / 2, -0.0], dtype=dtype))
    else:
        tensors.append(torch.tensor([2**63 - 1, -(2**63)]))
    store = Store.open(tmp_path, ("hidden",), repair=True)
    with store.writer() as writer:
        for number, tensor in enumerate(tensors):
            writer.add(entry_key(number=number), {"hidden": tensor}, {})
    for number, tensor in enumerate(tensors):
        found = Store.open(tmp_path, ("hidden",), repair=True).get(entry_key(number=number))["hidden"]
        assert_same_bits(found, tensor)


def test_views_and_tensors_with_gradients_are_stored_by_value(tmp_path: Path) -> None:
    store = open_latents(tmp_path)
    whole = torch.arange(24.0).reshape(4, 6).requires_grad_()
    with store.writer() as writer:
        writer.add(A, {"mean": whole.t()[1::2], "std": whole[:, 2]}, {})
        writer.add(B, {"mean": whole[:1, 2], "std": whole[0].expand(3, 6)}, {})
    assert torch.equal(store.get(A)["mean"], whole.detach().t()[1::2])
    assert torch.equal(store.get(A)["std"], whole.detach()[:, 2])
    assert torch.equal(store.get(B)["mean"], whole.detach()[:1, 2])
    assert torch.equal(store.get(B)["std"], whole.detach()[0].expand(3, 6))


def test_what_is_read_is_the_callers_to_change(tmp_path: Path) -> None:
    store = fill(tmp_path, range(1))
    key = entry_key(number=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns when a tensor lies on memory that must not be written
        store.get(key)["mean"].add_(1)
    assert torch.equal(store.get(key)["mean"], row(0)["mean"])


def test_empty_store(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "latents"
    store = open_latents(folder)
    with store.writer():
        pass
    assert folder.is_dir() and not list(folder.iterdir())
    assert (len(store), store.size_bytes, store.damaged, store.get_many([])) == (0, 0, [], [])


def test_missing_row_is_named(tmp_path: Path) -> None:
    store = fill(tmp_path, range(2))
    assert A not in store
    for read in (store.get, store.metadata, lambda key: store.get_many([entry_key(number=0), key])):
        with pytest.raises(KeyError, match=f"{tmp_path} has no entry {A}"):
            read(A)


@pytest.mark.parametrize(
    ("limits", "shards"),
    [({}, 1), ({"max_rows": 3}, 4), ({"max_shard_bytes": 5 * (48 + 24)}, 2), ({"max_seconds": 0.0}, 10)],
    ids=["none", "rows", "bytes", "seconds"],
)
def test_limits_of_a_shard(tmp_path: Path, limits: dict[str, float], shards: int) -> None:
    written = fill(tmp_path, range(10), **limits)
    assert len(shard_names(tmp_path)) == shards
    assert_rows(written, range(10))
    assert_rows(open_latents(tmp_path), range(10))


def test_a_shard_of_many_record_batches(tmp_path: Path) -> None:
    assert_rows(fill(tmp_path, range(100)), range(100))
    assert len(shard_names(tmp_path)) == 1


def test_rows_can_be_read_while_the_writer_is_open(tmp_path: Path) -> None:
    store = open_latents(tmp_path)
    with store.writer(max_rows=2) as writer:
        for number in range(3):
            writer.add(entry_key(number=number), row(number), {"number": number})
        writer.flush()
        assert_rows(store, range(3))
        writer.add(entry_key(number=3), row(3), {"number": 3})
    assert_rows(store, range(4))


def test_get_many_keeps_order_and_allows_duplicates(tmp_path: Path) -> None:
    store = fill(tmp_path, range(7), max_rows=2)
    numbers = [5, 0, 6, 5, 1, 5]
    found = store.get_many([entry_key(number=number) for number in numbers])
    assert [int(entry["mean"][0, 0, 0]) for entry in found] == numbers
    assert found[0]["mean"].data_ptr() != found[3]["mean"].data_ptr()


def test_size_on_disk(tmp_path: Path) -> None:
    store = fill(tmp_path, range(5), max_rows=2)
    assert store.size_bytes == sum(path.stat().st_size for path in tmp_path.glob("*.arrow")) > 0


def test_the_same_rows_make_the_same_files(tmp_path: Path) -> None:
    fill(tmp_path / "a", range(70))
    fill(tmp_path / "b", range(70))
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(files) == 3
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_manifest_says_what_the_shard_is(tmp_path: Path) -> None:
    fill(tmp_path, range(3))
    (path,) = tmp_path.glob("*.json")
    manifest = json.loads(path.read_text())
    assert set(manifest) == {"format", "tensors", "rows", "bytes", "libraries", "kinds", "places"}
    assert (manifest["format"], manifest["tensors"], manifest["rows"]) == (2, ["mean", "std"], 3)
    assert manifest["kinds"] == [[["float16", [4, 2, 3]], ["float32", [6]]]]
    assert path.stem == f"shard-{content_hash(path.read_bytes())}"
    assert manifest["bytes"] == path.with_suffix(".arrow").stat().st_size


def test_two_stores_that_wrote_the_same_rows_at_once(tmp_path: Path) -> None:
    first, second = open_latents(tmp_path), open_latents(tmp_path)
    for store in (first, second):
        with store.writer() as writer:
            writer.add(A, row(1), {"number": 1})
    assert len(shard_names(tmp_path)) == 1
    assert len(open_latents(tmp_path)) == 1


def shard_of(folder: Path, number: int) -> list[Path]:
    """The two files of a shard with the key "a" and a value of its own, as another machine would copy them into a folder."""
    with open_latents(folder).writer() as writer:
        writer.add(A, row(number), {"number": number})
    return sorted(folder.glob("shard-*"))


@pytest.mark.parametrize("numbers", [(1, 2), (2, 1)], ids=["smaller name first", "smaller name last"])
def test_which_of_two_values_is_read_never_changes(tmp_path: Path, numbers: tuple[int, int]) -> None:
    """Two machines made one entry. A reader from before, between and after, and a later one, read what the first one read."""
    folder = tmp_path / "cache"
    before = open_latents(folder)
    shards = [shard_of(tmp_path / str(number), number) for number in numbers]
    for path in shards[0]:
        shutil.copy(path, folder)
    between = open_latents(folder)
    read = [between.metadata(A)["number"]]
    for path in shards[1]:
        shutil.copy(path, folder)
    after = open_latents(folder, repair=False)
    for store in (before, between, after):
        store.refresh()
    read += [store.metadata(A)["number"] for store in (before, between, after, open_latents(folder))]
    assert read == [numbers[0]] * 5
    assert torch.equal(after.get(A)["mean"], row(numbers[0])["mean"])
    # Without the first one, the other counts.
    for path in shards[0]:
        (folder / path.name).unlink()
    assert open_latents(folder).metadata(A)["number"] == numbers[1]


@pytest.mark.parametrize("numbers", [(1, 2), (2, 1)])
def test_two_stores_that_made_one_entry_agree_from_the_start(tmp_path: Path, numbers: tuple[int, int]) -> None:
    stores, read = [open_latents(tmp_path), open_latents(tmp_path)], []
    for store, number in zip(stores, numbers, strict=True):
        with store.writer(max_rows=1) as writer:
            writer.add(A, row(number), {"number": number})
            writer.flush()
            read.append(store.metadata(A)["number"])
    for store in stores:
        store.refresh()
    assert read + [store.metadata(A)["number"] for store in (*stores, open_latents(tmp_path))] == [numbers[0]] * 5


def test_a_writer_leaves_out_what_another_has_made_meanwhile(tmp_path: Path) -> None:
    mine, other = open_latents(tmp_path), open_latents(tmp_path)
    with mine.writer(max_rows=1) as writer:
        with other.writer() as others:
            others.add(B, row(2), {"number": 2})
        writer.add(A, row(1), {"number": 1})
        writer.flush()
        writer.add(B, row(3), {"number": 3})
    assert len(shard_names(tmp_path)) == 2 and mine.metadata(B) == {"number": 2}


def test_the_order_of_shards_without_a_list_that_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read-only folder: nothing is an error, and what a store has read stays for as long as it is open."""
    shards = [shard_of(tmp_path / str(number), number) for number in (1, 2)]
    folder = tmp_path / "cache"
    folder.mkdir()

    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(cache_order, "_create", refuse)
    late, early = sorted(shards, key=lambda paths: paths[0].name, reverse=True)
    for path in late:
        shutil.copy(path, folder)
    store = open_latents(folder)
    value = store.metadata(A)
    for path in early:
        shutil.copy(path, folder)
    store.refresh()
    assert store.metadata(A) == value


def test_readers_that_come_at_once_make_one_order(tmp_path: Path) -> None:
    names = [[f"shard-{process}-{number}" for number in range(20)] for process in range(3)]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=list_one_by_one, args=(tmp_path, part)) for part in names]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    listed = cache_order.in_order(tmp_path, [])
    assert sorted(listed) == sorted(sum(names, []))
    for part in names:
        assert [name for name in listed if name in part] == part


def list_one_by_one(folder: Path, names: list[str]) -> None:
    known: list[str] = []
    for name in names:
        found = cache_order.in_order(folder, [name])
        assert found[: len(known)] == known, "what was listed stays where it was"
        known = found


def test_refresh_takes_up_what_others_wrote_and_reads_no_manifest_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []

    def read_manifest(path: Path, tensors: tuple[str, ...]) -> object:
        read.append(path.stem)
        return original(path, tensors)

    original = cache.read_manifest
    monkeypatch.setattr(cache, "read_manifest", read_manifest)
    store = fill(tmp_path, range(2))
    other = open_latents(tmp_path)
    with other.writer() as writer:
        writer.add(entry_key(number=2), row(2), {"number": 2})
    read.clear()
    assert len(store) == 2
    store.refresh()
    assert len(store) == 3
    store.refresh()
    assert len(read) == 1


def write_some(folder: Path, numbers: range) -> None:
    fill(folder, numbers, max_rows=3)


def test_few_shards_are_kept_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that was filled in many sittings has more shards than a process may have files open."""
    monkeypatch.setattr(cache, "_OPEN_FILES", 2)
    store = fill(tmp_path, range(5), max_rows=1)
    assert_rows(store, range(5))
    assert len([file.path for file in psutil.Process().open_files() if file.path.endswith(".arrow")]) == 2


def test_opening_a_store_reads_no_arrow_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, range(3), max_rows=1)
    for path in tmp_path.glob("*.arrow"):
        path.write_bytes(bytes(path.stat().st_size))
    store = open_latents(tmp_path)
    assert len(store) == 3 and store.has(packed([entry_key(number=1), A])).tolist() == [True, False]
    with pytest.raises(
        UserError, match="is damaged .the bytes of row 0 are not those that were written.: run the same"
    ):
        store.get(entry_key(number=1))
    assert len(open_latents(tmp_path)) == 2, "the shard that was found damaged is set aside"


def test_processes_fill_one_folder_together(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    parts = [range(0, 20), range(20, 40), range(40, 60)]
    processes = [context.Process(target=write_some, args=(tmp_path, part)) for part in parts]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert_rows(open_latents(tmp_path), range(60))
    assert not list(tmp_path.glob(".*"))


def test_a_store_sent_to_another_process_goes_by_its_files(tmp_path: Path) -> None:
    store = open_latents(tmp_path)
    with store.writer() as writer:
        writer.add(A, {"mean": torch.zeros(200_000), "std": torch.zeros(1)}, {})
    sent = pickle.dumps(store)
    assert len(sent) < 100_000
    assert torch.equal(pickle.loads(sent).get(A)["mean"], torch.zeros(200_000))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_rows_added_before_an_exception_are_kept(tmp_path: Path, error: type[BaseException]) -> None:
    store = open_latents(tmp_path)
    with pytest.raises(error), store.writer() as writer:
        writer.add(entry_key(number=0), row(0), {"number": 0})
        raise error
    assert_rows(open_latents(tmp_path), range(1))


def test_an_interrupt_while_a_shard_is_written_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal comes to the main thread while the writer's thread is in the middle of a shard."""
    is_writing, go_on = threading.Event(), threading.Event()

    def slow(file: object) -> None:
        is_writing.set()
        go_on.wait(60)
        fsync_file(file)

    monkeypatch.setattr(cache_shards, "fsync_file", slow)
    with pytest.raises(KeyboardInterrupt), open_latents(tmp_path).writer(max_rows=2) as writer:
        for number in range(3):
            writer.add(entry_key(number=number), row(number), {"number": number})
        assert is_writing.wait(60)
        go_on.set()
        raise KeyboardInterrupt
    assert_rows(open_latents(tmp_path), range(3))
    assert not list(tmp_path.glob(".*"))


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    store = open_latents(tmp_path)
    bad = {"mean": torch.tensor([1.0, float("nan")]), "std": torch.zeros(1)}
    with pytest.raises(AssertionError, match=f"mean of the entry {A} is not finite"), store.writer() as writer:
        writer.add(entry_key(number=0), row(0), {"number": 0})
        writer.add(A, bad, {})
    assert_rows(open_latents(tmp_path), range(1))


def test_an_entry_is_added_once(tmp_path: Path) -> None:
    store, key = open_latents(tmp_path), entry_key(number=0)
    with pytest.raises(AssertionError, match=f"{key} is added twice"), store.writer() as writer:
        for _ in range(2):
            writer.add(key, row(0), {"number": 0})
    with store.writer() as writer:
        writer.add(key, row(1), {"number": 1})
    assert_rows(open_latents(tmp_path), range(1))


def test_tensors_of_other_names_are_refused(tmp_path: Path) -> None:
    store = open_latents(tmp_path)
    with pytest.raises(AssertionError, match=r"\['mean'\], not \('mean', 'std'\)"), store.writer() as writer:
        writer.add(A, {"mean": torch.zeros(1)}, {})


def test_a_store_of_other_tensors_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, range(1))
    with pytest.raises(UserError, match=rf"{tmp_path} holds entries of the tensors mean, std where .* expects hidden:"):
        Store.open(tmp_path, ("hidden",), repair=True)


def test_a_store_of_another_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = {"format": 1, "tensors": ["mean", "std"], "rows": 1, "bytes": 8, "checksum": "0" * 32, "seal": "1" * 32}
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / f"shard-{'0' * 32}.json").write_text(json.dumps(first))
    with pytest.raises(
        UserError, match=r"first holds entries of format 1 where this run expects format 2: .* delete this"
    ):
        open_latents(tmp_path / "first")
    fill(tmp_path, range(1))
    monkeypatch.setattr("sushi_research.caches.shards.FORMAT_VERSION", 3)
    with pytest.raises(UserError, match=rf"{tmp_path} holds entries of format 2 where this run expects format 3:"):
        open_latents(tmp_path)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=rf"{tmp_path / 'file'} cannot be used \(File exists\)"):
        open_latents(tmp_path / "file")
