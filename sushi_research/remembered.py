"""What was computed from the data before, as columns in files: each result is found again by a hash of all that determines it.

A file is `<kind>-<key>.arrow`: an Arrow stream of one row, in which every array is one list, and a seal after it. The seal is
verified before the file is used. It guards against damage, not against somebody who writes files on purpose. The arrays are mapped
from the file, so that only the pages that are used take memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import xxhash

from sushi_research import stopping
from sushi_research.errors import UserError
from sushi_research.files import make_folder, replacing
from sushi_research.temporaries import remove_abandoned

Array = np.ndarray | pa.Array

# Increment it when the format of the files changes. What a kind means is for its key to say.
VERSION = 1
# Files of a kind that are kept, the ones used last: of several data sets, rules and base models in turn. Those that a command has
# used itself are kept too, because it may have more sets of images than this.
MOST = 12
# The times of files are less exact than the clock: by two seconds on FAT.
_INEXACT_NS = 2 * 10**9
_CHUNK = 1 << 20
_SEAL_BYTES = 64


class Remembered:
    """The remembered results in `folder`, which is made when there is something to write.

    Of several processes of a command only the first writes. If the folder cannot be written, results are only made again.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._since = time.time_ns() - _INEXACT_NS

    def arrays(self, kind: str, key: str, make: Callable[[], Mapping[str, Array]]) -> dict[str, Array]:
        """What `make()` returned for this kind and key at some time, read-only; it is called if there is nothing, or only damage.

        `kind` names what is computed, such as "epoch-items". `key` is a hash, in hex digits, of everything that determines the
        result: the code's own version, settings and data (`columns_hash`).
        """
        known = self.find(kind, key)
        return self.put(kind, key, make()) if known is None else known

    def find(self, kind: str, key: str) -> dict[str, Array] | None:
        """What is remembered for this kind and key; None if there is nothing, or it is damaged."""
        path = self._path(kind, key)
        try:
            known = _read(path, f"{kind} {key}")
            with contextlib.suppress(OSError):  # the folder may be read-only
                os.utime(path)  # it was used last
        except (OSError, ValueError, LookupError, pa.ArrowException):
            return None
        return known

    def put(self, kind: str, key: str, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Stores arrays in place of what was remembered for this kind and key, and returns them as `find` would."""
        if stopping.is_first():
            path = self._path(kind, key)
            with contextlib.suppress(UserError, OSError):
                make_folder(self.folder)
                with replacing(path) as file:
                    _write(file, f"{kind} {key}", arrays)
                self._forget_oldest(kind)
        return {name: _read_only(array) for name, array in arrays.items()}

    def _path(self, kind: str, key: str) -> Path:
        assert kind.replace("-", "").isalnum() and key.isalnum(), (kind, key)
        return self.folder / f"{kind}-{key}.arrow"

    def _forget_oldest(self, kind: str) -> None:
        remove_abandoned(self.folder)
        files = [path for path in self.folder.glob(f"{kind}-*.arrow") if path.stem.rpartition("-")[0] == kind]
        for used, path in sorted((path.stat().st_mtime_ns, path) for path in files)[:-MOST]:
            if used < self._since:
                path.unlink(missing_ok=True)


# Finds nothing and stores nothing: there can be no folder below this file.
NOTHING_REMEMBERED = Remembered(Path(os.devnull) / "remembered")


def columns_hash(*arrays: Array | pa.ChunkedArray) -> str:
    """A hash of columns, of their types and lengths, as 32 hex digits. It is fast (XXH3), and no proof against forgery."""
    digest = xxhash.xxh3_128()
    for array in arrays:
        if isinstance(array, np.ndarray):
            digest.update(f"{array.dtype.str} {array.shape} ".encode())
            digest.update(_bytes_of(array))
        else:
            if isinstance(array, pa.ChunkedArray):
                array = array.combine_chunks()
            batch = pa.record_batch({"": array})
            digest.update(f"{array.type} {len(array)} ".encode())
            with pa.ipc.new_stream(pa.PythonFile(_Sink(digest), "w"), batch.schema) as stream:
                stream.write_batch(batch)
    return digest.hexdigest()


class _Sink:
    """A file to write to: what is written is hashed, and goes on to another file if there is one."""

    closed = False

    def __init__(self, digest: xxhash.xxh3_128, file: BinaryIO | None = None) -> None:
        self.digest, self.file, self.written = digest, file, 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.written += len(data)
        return len(data) if self.file is None else self.file.write(data)

    def tell(self) -> int:
        return self.written

    def flush(self) -> None:
        """Nothing: whoever opened the file flushes it."""

    def close(self) -> None:
        """Nothing: whoever opened the file closes it."""


def _write(file: BinaryIO, name: str, arrays: Mapping[str, Array]) -> None:
    """Writes one list per array, and the seal."""
    fields, lists = [], []
    for column, array in arrays.items():
        about = None
        if isinstance(array, np.ndarray):
            about = {"dtype": array.dtype.str, "shape": json.dumps(array.shape)}
            array = _as_bytes(array)
        lists.append(pa.LargeListArray.from_arrays(pa.array([0, len(array)], pa.int64()), array))
        fields.append(pa.field(column, lists[-1].type, metadata=about))
    schema = pa.schema(fields)
    sink = _Sink(xxhash.xxh3_128(f"{VERSION} {name}".encode()), file)
    with pa.ipc.new_stream(pa.PythonFile(sink, "w"), schema) as stream:
        stream.write_batch(pa.record_batch(lists, schema=schema))
    file.write(_seal(sink.digest))


def _read(path: Path, name: str) -> dict[str, Array]:
    """The arrays of a file, mapped into memory. Raises ValueError and others if it is damaged, OSError if it cannot be read."""
    digest = xxhash.xxh3_128(f"{VERSION} {name}".encode())
    with open(path, "rb") as file:
        # Read, not mapped: the pages of a map count as memory of this process.
        left = os.fstat(file.fileno()).st_size - _SEAL_BYTES
        while left > 0:
            chunk = file.read(min(_CHUNK, left))
            if not chunk:
                raise ValueError("it was cut while it was read")
            digest.update(chunk)
            left -= len(chunk)
        if file.read() != _seal(digest):
            raise ValueError("it is damaged")
    batch = pa.ipc.open_stream(pa.memory_map(str(path))).read_next_batch()
    found: dict[str, Array] = {}
    for field, column in zip(batch.schema, batch.columns, strict=True):
        array = column.flatten()
        if field.metadata:
            shape, dtype = json.loads(field.metadata[b"shape"]), np.dtype(field.metadata[b"dtype"].decode())
            array = np.frombuffer(array.buffers()[1], dtype).reshape(shape) if len(array) else np.empty(shape, dtype)
        found[field.name] = array
    return found


def _seal(digest: xxhash.xxh3_128) -> bytes:
    return f"sushi-research remembered {digest.hexdigest()}".encode().ljust(_SEAL_BYTES, b"\n")


def _bytes_of(array: np.ndarray) -> memoryview | bytes:
    array = np.ascontiguousarray(array)
    return memoryview(array.view(np.uint8).reshape(-1)) if array.size else b""


def _as_bytes(array: np.ndarray) -> pa.Array:
    """The array's bytes as a column of numbers, without a copy."""
    data = _bytes_of(array)
    return pa.Array.from_buffers(pa.uint8(), len(data), [None, pa.py_buffer(data)])


def _read_only(array: Array) -> Array:
    if isinstance(array, np.ndarray):
        array = array.view()
        array.flags.writeable = False
    return array
