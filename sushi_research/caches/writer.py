"""Adds rows to a cache store. Shards are written in a background thread, so that an encoder does not wait for the disk."""

from __future__ import annotations

import errno
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Protocol

import torch

from sushi_research.caches.shards import make_row, write_shard
from sushi_research.errors import UserError


class _Store(Protocol):
    folder: Path
    tensors: tuple[str, ...]

    def __contains__(self, key: str) -> bool: ...
    def refresh(self) -> None: ...


class Writer:
    """Adds rows to a store. The rows added so far are also written if the with-block ends with an exception.

    At most two shards are in memory: one that is being written, and one that is being filled.
    """

    def __init__(self, store: _Store, max_shard_bytes: int, max_rows: int, max_seconds: float) -> None:
        self._store = store
        self._max_shard_bytes = max_shard_bytes
        self._max_rows = max_rows
        self._max_seconds = max_seconds
        self._rows: dict[str, dict[str, Any]] = {}
        self._writing: dict[str, dict[str, Any]] = {}
        self._bytes = 0
        self._written_at = time.monotonic()
        self._pool = ThreadPoolExecutor(1, "cache writer")
        self._result: Future[None] | None = None

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        with self._pool:  # waits for the thread, whatever happens
            self.flush()

    def add(self, key: str, tensors: dict[str, torch.Tensor], metadata: dict[str, Any]) -> None:
        """Adds a row: finite tensors of any shape (float16, bfloat16, float32 or int64) and metadata of JSON values.

        Does nothing if the store has the entry, because another process has added it. Raises UserError if a shard could not be
        written.
        """
        assert key not in self._rows and key not in self._writing, f"the entry {key} is added twice"
        assert set(tensors) == set(self._store.tensors), f"tensors {sorted(tensors)}, not {self._store.tensors}"
        if self._result and self._result.done():
            self._wait()
        if key in self._store:
            return
        self._rows[key] = make_row(key, tensors, metadata)
        self._bytes += sum(tensor.nbytes for tensor in tensors.values())
        late = time.monotonic() - self._written_at >= self._max_seconds
        if late or self._bytes >= self._max_shard_bytes or len(self._rows) >= self._max_rows:
            self._start()

    def flush(self) -> None:
        """Writes the rows added since the last shard, if any, and waits for it. Raises UserError if that fails."""
        self._start()
        self._wait()

    def _start(self) -> None:
        """Begins to write the rows added since the last shard, when the last one is written."""
        self._wait()
        self._written_at = time.monotonic()
        if self._rows:
            # In this order, an interrupt at any moment loses no row: at worst the same shard is written once more.
            self._result = self._pool.submit(self._write, list(self._rows.values()))
            self._writing, self._rows, self._bytes = self._rows, {}, 0

    def _wait(self) -> None:
        """Waits until the shard that is being written is in the store. Raises UserError if it cannot be written."""
        if self._result is None:
            return
        wait([self._result])
        result, self._result, lost = self._result, None, len(self._writing) + len(self._rows)
        self._writing = {}
        try:
            result.result()
        except OSError as error:
            self._rows = {}  # otherwise the end of the with-block would try, and fail, again
            raise UserError(self._cannot_write(error, lost)) from error

    def _write(self, rows: list[dict[str, Any]]) -> None:
        write_shard(self._store.folder, self._store.tensors, rows)
        self._store.refresh()

    def _cannot_write(self, error: OSError, lost: int) -> str:
        full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = {errno.EIO: "check that disk"} | dict.fromkeys(full, "free some space there")
        return (
            f"{lost} new entries cannot be written to the cache folder {self._store.folder} ({error.strerror}): "
            f"{advice.get(error.errno, 'make that folder writable')} or choose another folder; earlier entries are kept"
        )
