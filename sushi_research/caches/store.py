"""The cache store: rows of named tensors on disk, which several processes and several runs may fill at once.

A store is a folder of shards (see `cache_shards`), to which shards are only ever added. Every opening compares every
shard with its manifest. A damaged one is skipped, and so its entries are made again: whoever fills the store asks
`key in store` and adds what is not there. A store knows nothing of models; a key binds an entry to all that made it.
"""

from __future__ import annotations

import errno
import json
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sushi_research.caches.shards import (
    Damage,
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

if TYPE_CHECKING:
    from datasets import Dataset

_logger = logging.getLogger(__name__)


def entry_key(**recipe: Any) -> str:
    """The name of an entry: the hash of all that decides its value, as 32 hex digits.

    `recipe` holds JSON values; a tuple counts as a list, and the order of dictionary keys does not matter.

    Raises TypeError for a value that is not JSON and ValueError for a float that is not finite.
    """
    return json_hash(recipe)


class Store:
    """The rows of one kind (latents, say) in one folder. Make one with `Store.open`.

    `damaged` lists the shards that were found damaged since then, as (name, reason).
    """

    def __init__(self, folder: Path, tensors: tuple[str, ...], repair: bool) -> None:
        self.folder = folder
        self.tensors = tensors
        self.damaged: list[tuple[str, str]] = []
        self._repair = repair
        self._shards: dict[str, Dataset] = {}
        self._index: dict[str, tuple[str, int]] = {}  # key -> (shard name, row)

    @classmethod
    def open(cls, folder: Path, tensors: tuple[str, ...], *, repair: bool) -> Store:
        """Open the store in `folder`, which is made if it is missing, and check every shard in it.

        `tensors` names the tensors of a row. `repair` is for the main process alone: it renames damaged shards to
        `*.damaged`, where it may, and removes what killed writers left behind.

        Raises UserError when the folder cannot be used, or holds rows of another format or with other tensors.
        """
        store = cls(folder, tensors, repair)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            store.refresh()
            if repair:
                remove_leftovers(folder)
        except OSError as error:
            raise UserError(
                f"the cache folder {folder} cannot be used ({error.strerror}): "
                "give this user access to it or choose another one"
            ) from error
        return store

    def refresh(self) -> None:
        """Take up the shards that other processes have finished since; those in use are not checked again."""
        sizes = {
            path: _size(path.with_suffix(".arrow"))
            for path in sorted(self.folder.iterdir())
            if path.match("shard-*.json") and path.stem not in self._shards
        }
        total = sum(sizes.values())
        hidden = not self._repair or total < 1e9  # a gigabyte is checked in a second or two
        with progress(total=total // 10**6, description="checking the cache", unit="MB", disable=hidden) as bar:
            for path, size in sizes.items():
                self._take_up(path)
                bar.update(size // 10**6)

    def _take_up(self, manifest: Path) -> None:
        """Add one shard to the index, or leave it out if it is damaged."""
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
            return
        self._shards[name] = shard
        for row, key in enumerate(shard.data.column("key").to_pylist()):
            # Two runs at once may both have made an entry. The first shard by name wins, in every process.
            if key not in self._index or name < self._index[key][0]:
                self._index[key] = (name, row)

    def __contains__(self, key: str) -> bool:
        return key in self._index

    def __len__(self) -> int:
        return len(self._index)

    @property
    def size_bytes(self) -> int:
        """The bytes on disk of the shards in use."""
        return sum(_size(self.folder / f"{name}.arrow") for name in self._shards)

    def get(self, key: str) -> dict[str, torch.Tensor]:
        """The tensors of one row, by name: copies on the CPU, the caller's to change. KeyError if it is missing."""
        shard, row = self._find(key)
        return {name: read_tensor(shard, name, row) for name in self.tensors}

    def get_many(self, keys: list[str]) -> list[dict[str, torch.Tensor]]:
        """The rows of `keys`, in that order; a key may come twice. KeyError if a row is missing."""
        return [self.get(key) for key in keys]

    def metadata(self, key: str) -> dict[str, Any]:
        """The metadata that the row was added with. KeyError if there is no such row."""
        shard, row = self._find(key)
        return json.loads(shard.data.column("metadata")[row].as_py())

    def _find(self, key: str) -> tuple[Dataset, int]:
        if key not in self._index:
            raise KeyError(f"the cache {self.folder} has no entry {key}")
        name, row = self._index[key]
        return self._shards[name], row

    def writer(
        self, *, max_shard_bytes: int = 256 * 2**20, max_rows: int = 100_000, max_seconds: float = 60.0
    ) -> Writer:
        """A context manager that adds rows. It writes a shard at the end, and before that whenever a limit is reached.

        `max_seconds` is the time that a killed process may lose.
        """
        return Writer(self, max_shard_bytes, max_rows, max_seconds)


class Writer:
    """Adds rows to a store. In whatever way its with-block ends, the rows added so far are written."""

    def __init__(self, store: Store, max_shard_bytes: int, max_rows: int, max_seconds: float) -> None:
        self._store = store
        self._max_shard_bytes = max_shard_bytes
        self._max_rows = max_rows
        self._max_seconds = max_seconds
        self._rows: dict[str, dict[str, Any]] = {}
        self._bytes = 0
        self._written_at = time.monotonic()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()

    def add(self, key: str, tensors: dict[str, torch.Tensor], metadata: dict[str, Any]) -> None:
        """Add a row: finite tensors of any shape (float16, bfloat16, float32 or int64) and metadata of JSON values.

        Raises UserError when a shard was due and cannot be written.
        """
        assert key not in self._rows and key not in self._store, f"the entry {key} is added twice"
        assert set(tensors) == set(self._store.tensors), f"tensors {sorted(tensors)}, not {self._store.tensors}"
        self._rows[key] = make_row(key, tensors, metadata)
        self._bytes += sum(tensor.nbytes for tensor in tensors.values())
        late = time.monotonic() - self._written_at >= self._max_seconds
        if late or self._bytes >= self._max_shard_bytes or len(self._rows) >= self._max_rows:
            self.flush()

    def flush(self) -> None:
        """Write the rows added since the last shard as a new one, if any. UserError when that cannot be done."""
        self._written_at = time.monotonic()
        if not self._rows:
            return
        try:
            manifest = write_shard(self._store.folder, self._store.tensors, list(self._rows.values()))
        except OSError as error:
            message = self._cannot_write(error)
            self._clear()  # or the end of the with-block would try, and fail, once more
            raise UserError(message) from error
        self._clear()  # not sooner: an interrupt while writing leaves the rows to the end of the with-block
        self._store._take_up(manifest)  # read back and checked like any other

    def _clear(self) -> None:
        self._rows, self._bytes = {}, 0

    def _cannot_write(self, error: OSError) -> str:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = "free some space there" if full else "make that folder writable"
        return (
            f"{len(self._rows)} new entries ({self._bytes / 2**20:.1f} MiB) cannot be written to the cache folder "
            f"{self._store.folder} ({error.strerror}): {advice} or choose another folder; earlier entries are kept"
        )


def _size(path: Path) -> int:
    """The bytes of a file, 0 if it is missing."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
