"""The cache store: rows of named tensors on disk. Several processes and several runs may fill it at the same time.

A store is a folder of shards (see `shards.py`). Shards are only added, never changed. Opening a store verifies every
shard against its manifest. Damaged shards are skipped, so their entries are computed again: writers check `key in store`
and add what is missing. A store does not know about models; the key is a hash of everything that determines an entry.

Two machines may both make an entry, with values that differ in their last bits. Which of the two is read never changes: the
first that any reader saw (see `order.py`). If that shard is lost or damaged, its entries are made again, as all lost entries are.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from sushi_research.caches import order
from sushi_research.caches.shards import (
    Damage,
    Shard,
    aside_name,
    json_hash,
    make_row,
    open_shard,
    read_tensor,
    remove_leftovers,
    set_aside,
    write_shard,
)
from sushi_research.errors import UserError
from sushi_research.progress import progress

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_logger = logging.getLogger(__name__)


def entry_key(**recipe: Any) -> str:
    """The key of an entry: the hash of everything that determines its value, as 32 hex digits.

    `recipe` holds JSON values; a tuple counts as a list, and the order of dictionary keys does not matter.

    Raises TypeError for a value that is not JSON and ValueError for a float that is not finite.
    """
    return json_hash(recipe)


class Store:
    """The rows of one kind (such as latents) in one folder. Create it with `Store.open`.

    `damaged` lists the shards that were found damaged since opening, as (name, reason).
    """

    def __init__(self, folder: Path, tensors: tuple[str, ...], repair: bool) -> None:
        self.folder = folder
        self.tensors = tensors
        self.damaged: list[tuple[str, str]] = []
        self._repair = repair
        self._shards: dict[str, Shard] = {}
        self._index: dict[str, tuple[str, int]] = {}  # key -> (shard name, row)

    @classmethod
    def open(cls, folder: Path, tensors: tuple[str, ...], *, repair: bool) -> Store:
        """Opens the store in `folder`, creating it if it is missing, and verifies every shard.

        `tensors` names the tensors of a row. `repair` is for the main process only: it renames damaged shards to
        `*.damaged`, if the folder is writable, and removes unfinished files of killed writers.

        Raises UserError if the folder cannot be used, or has rows of another format or with other tensors.
        """
        store = cls(folder, tensors, repair)
        with _usable(folder):
            folder.mkdir(parents=True, exist_ok=True)
            store.refresh()
            if repair:
                remove_leftovers(folder)
        return store

    def refresh(self) -> set[str]:
        """Adds shards that other processes have finished meanwhile; returns the new keys. Known shards are not verified again.

        Raises UserError if the folder cannot be used.
        """
        with _usable(self.folder):
            return self._refresh()

    def _refresh(self) -> set[str]:
        found = {path.stem for path in self.folder.iterdir() if path.match("shard-*.json")}
        new = [name for name in order.in_order(self.folder, found, aside_name(self.folder)) if name not in self._shards]
        manifests = [self.folder / f"{name}.json" for name in new]
        # A listed shard may be gone. One that is listed and was not found above has just come.
        sizes = {path: _size(path.with_suffix(".arrow")) for path in manifests if path.exists()}
        keys: set[str] = set()
        total = sum(sizes.values())
        hidden = not self._repair or total < 1e9  # checking a gigabyte takes a second or two
        with progress(total=total // 10**6, description="checking the cache", unit="MB", disable=hidden) as bar:
            for path, size in sizes.items():
                keys |= self._take_up(path)
                bar.update(size // 10**6)
        return keys

    def _take_up(self, manifest: Path) -> set[str]:
        """Adds one shard to the index and returns its new keys, or skips it if it is damaged."""
        name = manifest.stem
        try:
            shard = open_shard(manifest, self.tensors)
        except Damage as damage:
            if (name, str(damage)) not in self.damaged:
                self.damaged.append((name, str(damage)))
                path = manifest.with_suffix(".arrow")
                _logger.warning("%s is damaged (%s): it is skipped and its entries are made again", path, damage)
            if self._repair:
                set_aside(manifest)
            return set()
        self._shards[name] = shard
        # An entry that is known already stays: shards are taken up in their order.
        new = {key: (name, row) for row, key in enumerate(shard.column("key").to_pylist())}
        new = {key: place for key, place in new.items() if key not in self._index}
        self._index |= new
        return set(new)

    def __contains__(self, key: str) -> bool:
        return key in self._index

    def __len__(self) -> int:
        return len(self._index)

    @property
    def size_bytes(self) -> int:
        """The bytes on disk of the shards in use."""
        return sum(_size(self.folder / f"{name}.arrow") for name in self._shards)

    def get(self, key: str) -> dict[str, torch.Tensor]:
        """The tensors of one row by name, as copies on the CPU.

        Raises KeyError if it is missing, and UserError if its file was changed since it was verified.
        """
        shard, row = self._find(key)
        return {name: read_tensor(shard, name, row) for name in self.tensors}

    def get_many(self, keys: list[str]) -> list[dict[str, torch.Tensor]]:
        """The rows of `keys`, in that order; duplicates are allowed. Raises KeyError if a row is missing."""
        return [self.get(key) for key in keys]

    def metadata(self, key: str) -> dict[str, Any]:
        """The metadata of a row. Raises KeyError if it is missing."""
        shard, row = self._find(key)
        return json.loads(shard.column("metadata")[row].as_py())

    def _find(self, key: str) -> tuple[Shard, int]:
        if key not in self._index:
            raise KeyError(f"the cache {self.folder} has no entry {key}")
        name, row = self._index[key]
        return self._shards[name], row

    def writer(
        self, *, max_shard_bytes: int = 256 * 2**20, max_rows: int = 100_000, max_seconds: float = 60.0
    ) -> Writer:
        """A context manager for adding rows. It writes a shard whenever a limit is reached, and at the end.

        `max_seconds` limits how much work is lost if the process is killed.
        """
        return Writer(self, max_shard_bytes, max_rows, max_seconds)


class Writer:
    """Adds rows to a store. The rows added so far are also written if the with-block ends with an exception."""

    def __init__(self, store: Store, max_shard_bytes: int, max_rows: int, max_seconds: float) -> None:
        self._store = store
        self._max_shard_bytes = max_shard_bytes
        self._max_rows = max_rows
        self._max_seconds = max_seconds
        self._rows: dict[str, dict[str, Any]] = {}
        self._made_by_others: set[str] = set()
        self._bytes = 0
        self._written_at = time.monotonic()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()

    def add(self, key: str, tensors: dict[str, torch.Tensor], metadata: dict[str, Any]) -> None:
        """Adds a row: finite tensors of any shape (float16, bfloat16, float32 or int64) and metadata of JSON values.

        Does nothing if another process has added the entry since this writer was made. Raises UserError if a limit is reached and
        the shard cannot be written.
        """
        if key in self._made_by_others:
            return
        assert key not in self._rows and key not in self._store, f"the entry {key} is added twice"
        assert set(tensors) == set(self._store.tensors), f"tensors {sorted(tensors)}, not {self._store.tensors}"
        self._rows[key] = make_row(key, tensors, metadata)
        self._bytes += sum(tensor.nbytes for tensor in tensors.values())
        late = time.monotonic() - self._written_at >= self._max_seconds
        if late or self._bytes >= self._max_shard_bytes or len(self._rows) >= self._max_rows:
            self.flush()

    def flush(self) -> None:
        """Writes the rows added since the last shard, if any, as a new shard. Raises UserError if that fails."""
        self._written_at = time.monotonic()
        if not self._rows:
            return
        try:
            write_shard(self._store.folder, self._store.tensors, list(self._rows.values()))
        except OSError as error:
            message = self._cannot_write(error)
            self._clear()  # otherwise the end of the with-block would try, and fail, again
            raise UserError(message) from error
        mine = set(self._rows)
        self._clear()  # not earlier: if writing is interrupted, the end of the with-block writes the rows
        # Reads the shard back and verifies it, after the shards of others that come before it in the order.
        self._made_by_others |= self._store.refresh() - mine

    def _clear(self) -> None:
        self._rows, self._bytes = {}, 0

    def _cannot_write(self, error: OSError) -> str:
        advice = {errno.EIO: "check that disk"} | dict.fromkeys(_FULL, "free some space there")
        advice = advice.get(error.errno, "make that folder writable")
        return (
            f"{len(self._rows)} new entries ({self._bytes / 2**20:.1f} MiB) cannot be written to the cache folder "
            f"{self._store.folder} ({error.strerror}): {advice} or choose another folder; earlier entries are kept"
        )


@contextlib.contextmanager
def _usable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        advice = {errno.EIO: "check its disk"} | dict.fromkeys(_FULL, "free some space there")
        advice = advice.get(error.errno, "give this user access to it")
        raise UserError(
            f"the cache folder {folder} cannot be used ({error.strerror}): {advice} or choose another one"
        ) from error


def _size(path: Path) -> int:
    """The bytes of a file, 0 if it is missing."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
