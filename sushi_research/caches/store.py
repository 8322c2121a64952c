"""The cache store: rows of named tensors on disk. Several processes and several runs may fill it at the same time.

A store is a folder of shards (see `shards.py`). Shards are only added, never changed. Opening a store reads their manifests; a row
is verified when it is read. Shards whose manifest or size is wrong are skipped, so their entries are computed again: writers ask
which keys the store has, and add what is missing. A store does not know about models; the key is a hash of everything that
determines an entry.

Two machines may both make an entry, with values that differ in their last bits. Which of the two is read never changes: the
first that any reader saw (see `order.py`). If that shard is lost or damaged, its entries are made again, as all lost entries are.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from sushi_research.caches import known_index, order
from sushi_research.caches.index import Index
from sushi_research.caches.keys import packed
from sushi_research.caches.shards import Damage, Manifest, read_manifest, read_row, require_size, set_aside
from sushi_research.caches.writer import Writer
from sushi_research.errors import UserError
from sushi_research.remembered import NOTHING_REMEMBERED, Remembered
from sushi_research.temporaries import remove_abandoned

# The files that are kept open. A cache may have more shards than a process may have files open.
_OPEN_FILES = 64

_logger = logging.getLogger(__name__)


class Store:
    """The rows of one kind (such as latents) in one folder. Create it with `Store.open`. Threads may share it.

    `damaged` lists the shards that were found damaged since opening, as (name, reason).
    """

    def __init__(self, folder: Path, tensors: tuple[str, ...], repair: bool) -> None:
        self.folder = folder
        self.tensors = tensors
        self.damaged: list[tuple[str, str]] = []
        self._repair = repair
        self._names: list[str] = []  # of the shards, by the numbers that the index has
        self._sizes: dict[str, tuple[int, int]] = {}  # by name: the bytes of the Arrow file, and the rows
        self._index = Index()
        self._manifests: dict[str, Manifest] = {}  # of the shards that were read from
        self._files: OrderedDict[str, BinaryIO] = OrderedDict()
        self._lock = threading.RLock()
        self._descriptor: int | None = None  # of the folder, which is locked

    @classmethod
    def open(
        cls,
        folder: Path,
        tensors: tuple[str, ...],
        *,
        repair: bool,
        remembered: Remembered = NOTHING_REMEMBERED,
    ) -> Store:
        """Opens the store in `folder`, creating it if it is missing.

        `tensors` names the tensors of a row. `repair` is for the main process only: it renames damaged shards to `*.damaged`, if
        the folder is writable, and removes what killed writers left. With `remembered`, manifests that were read before are not
        read again: the name of a manifest is the hash of its content.

        Raises UserError if the folder cannot be used, or has rows of another format or with other tensors.
        """
        store = cls(folder, tensors, repair)
        with _usable(folder):
            folder.mkdir(parents=True, exist_ok=True)
            store._hold()
            names = store._shards_there()
            if known := known_index.recall(remembered, folder, tensors, names):
                store._names, (store._index, store._sizes) = names, known
            else:
                store._take_up_all(names)
            if not store.damaged:  # which is to be found again
                known_index.remember(remembered, folder, tensors, store._index, store._sizes)
        if repair:
            remove_abandoned(folder)
        return store

    def refresh(self) -> None:
        """Adds shards that other processes have finished meanwhile. Raises UserError if the folder cannot be used."""
        with self._lock, _usable(self.folder):
            self._take_up_all(self._shards_there())

    def _take_up_all(self, names: Sequence[str]) -> None:
        """Adds those of these shards that are new and not damaged to the index, in their order."""
        known = set(self._names)
        columns = []
        for name in names:
            if name not in known and (manifest := self._take_up(name)):
                columns.append((len(self._names), manifest.keys))
                self._names.append(name)
                self._sizes[name] = manifest.size, len(manifest.keys)
        self._index = self._index.with_shards(columns)

    def _shards_there(self) -> list[str]:
        """The names of the shards whose manifests are in the folder, in the order of the store."""
        found = {path.stem for path in self.folder.iterdir() if path.match("shard-*.json")}
        # A listed shard may be gone. One that is listed and was not found above has just come.
        return [
            name for name in order.in_order(self.folder, found) if name in found or self._manifest_path(name).exists()
        ]

    def _take_up(self, name: str) -> Manifest | None:
        """The manifest of a new shard; None if the shard is damaged, which is logged."""
        path = self._manifest_path(name)
        try:
            manifest = read_manifest(path, self.tensors)
            require_size(manifest, path.with_suffix(".arrow"))
            return manifest
        except Damage as damage:
            if (name, str(damage)) not in self.damaged:
                self.damaged.append((name, str(damage)))
                path = path.with_suffix(".arrow")
                _logger.warning("%s is damaged (%s): it is skipped and its entries are made again", path, damage)
            if self._repair:
                set_aside(self._manifest_path(name))
            return None

    def __contains__(self, key: str) -> bool:
        return bool(self.has(packed([key]))[0])

    def __len__(self) -> int:
        return len(self._index)

    @property
    def size_bytes(self) -> int:
        """The bytes on disk of the shards in use."""
        return sum(size for size, _ in self._sizes.values())

    @property
    def keys(self) -> np.ndarray:
        """The keys of all entries, [n] of PACKED, sorted."""
        return self._index.keys

    def shards(self) -> Iterator[tuple[str, int, int, np.ndarray]]:
        """(name, bytes, rows, the positions in `keys` of the entries that are read from it) of each shard."""
        order = np.argsort(self._index.shards, kind="stable")
        ends = np.searchsorted(self._index.shards[order], np.arange(len(self._names) + 1))
        for name, start, end in zip(self._names, ends[:-1], ends[1:], strict=True):
            yield name, *self._sizes[name], order[start:end]

    def has(self, keys: np.ndarray) -> np.ndarray:
        """Whether the store has each key [n] of PACKED, bool [n]."""
        return self._index.find(keys) >= 0

    def get(self, key: str) -> dict[str, torch.Tensor]:
        """The tensors of one row by name, on the CPU.

        Raises KeyError if it is missing, and UserError if it is damaged; then its shard is renamed, to be made again.
        """
        return self.get_many([key])[0]

    def get_many(self, keys: Sequence[str]) -> list[dict[str, torch.Tensor]]:
        """The rows of `keys`, in that order; duplicates are allowed. Raises the errors of `get`."""
        return [tensors for tensors, _ in self._read(keys)]

    def row(self, key: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """The tensors and the metadata of a row. Raises the errors of `get`."""
        return self._read([key])[0]

    def metadata(self, key: str) -> dict[str, Any]:
        """The metadata of a row. Raises the errors of `get`."""
        return self.row(key)[1]

    def _read(self, keys: Sequence[str]) -> list[tuple[dict[str, torch.Tensor], dict[str, Any]]]:
        index = self._index
        positions = index.find(packed(keys))
        if (missing := np.flatnonzero(positions < 0)).size:
            raise KeyError(f"the cache {self.folder} has no entry {keys[missing[0]]}")
        places = zip(index.shards[positions].tolist(), index.rows[positions].tolist(), strict=True)
        return [self._row(self._names[shard], row) for shard, row in places]

    def _hold(self) -> None:
        """Locks the folder, with others, for as long as this store is open. UserError if it is being pruned."""
        if fcntl is None:
            return
        self._descriptor = os.open(self.folder, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)
        if not self._lock_folder(fcntl.LOCK_SH):
            raise UserError(
                f"the cache folder {self.folder} is being pruned: run the same command again when that has ended"
            )

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """A block in which no other process uses the store. UserError if one does.

        Where the file system has no locks (Windows, some network file systems), nothing is known of others.
        """
        if self._descriptor is None:
            yield
            return
        if not self._lock_folder(fcntl.LOCK_EX):
            raise UserError(
                f"the cache folder {self.folder} is in use by another command: prune it when that has ended"
            )
        try:
            yield
        finally:
            self._lock_folder(fcntl.LOCK_SH)

    def _lock_folder(self, kind: int) -> bool:
        """Whether the folder has the lock, or cannot be locked."""
        try:
            fcntl.flock(self._descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True

    def _row(self, name: str, row: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        with self._lock:
            try:
                return read_row(self._file(name), self._manifest(name), row)
            except Damage as damage:
                self.damaged.append((name, str(damage)))
                self._close(name)
                path = self._manifest_path(name).with_suffix(".arrow")
                aside = set_aside(self._manifest_path(name))
                raise UserError(
                    f"the cache file {path} is damaged ({damage}): {'' if aside else 'delete it and its .json, and '}run the same "
                    "command again, which makes its entries again and goes on from the last checkpoint"
                ) from damage

    def _manifest(self, name: str) -> Manifest:
        if name not in self._manifests:
            self._manifests[name] = read_manifest(self._manifest_path(name), self.tensors)
        return self._manifests[name]

    def _file(self, name: str) -> BinaryIO:
        """The open Arrow file of a shard. UserError if it is gone."""
        if name in self._files:
            self._files.move_to_end(name)
            return self._files[name]
        path = self._manifest_path(name).with_suffix(".arrow")
        try:
            file = open(path, "rb", buffering=0)
        except FileNotFoundError as error:
            raise UserError(
                f"the cache file {path} was removed while it was in use: run the same command again, which makes its entries again "
                "and goes on from the last checkpoint"
            ) from error
        except OSError as error:
            raise UserError(f"the cache file {path} cannot be read ({error.strerror}): make it readable") from error
        self._files[name] = file
        if len(self._files) > _OPEN_FILES:
            self._close(next(iter(self._files)))
        return file

    def _close(self, name: str) -> None:
        if file := self._files.pop(name, None):
            file.close()

    def _manifest_path(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def __getstate__(self) -> dict[str, Any]:
        # A process that the store is sent to opens the files itself.
        return self.__dict__ | {"_files": OrderedDict(), "_lock": None, "_descriptor": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"_lock": threading.RLock()}

    def writer(
        self, *, max_shard_bytes: int = 256 * 2**20, max_rows: int = 100_000, max_seconds: float = 60.0
    ) -> Writer:
        """A context manager for adding rows. It writes a shard whenever a limit is reached, and at the end.

        `max_seconds` limits how much work is lost if the process is killed.
        """
        return Writer(self, max_shard_bytes, max_rows, max_seconds)


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


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
