"""The files of a cache store: shards, each an Arrow file and a manifest for verifying it.

`shard-<checksum>.arrow` is an Arrow file as `datasets` writes it. Its manifest, `shard-<checksum>.json`, has the format
version, the tensors of a row, the number of rows, size, checksum, library versions, and a seal: the checksum of the
manifest's own content. A shard never changes and is named after the checksum of its bytes. So writers need no lock: two
writers use the same file name only for the same bytes. Both files are written under temporary names, synced and renamed,
the manifest last. An Arrow file without a manifest is not part of the store.

Arrow itself does not detect a flipped bit, or a file that is truncated after a record batch. `open_shard` detects both.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import socket
import time
import uuid
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from sushi_research.errors import UserError
from sushi_research.files import fsync_file, fsync_folder
from sushi_research.user_files import UnreadableFile, kind_of, parse_json, read_regular

FORMAT_VERSION = 1

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "int64": torch.int64}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_ROWS_PER_BATCH = 32  # bounds the memory for Arrow's copies while a shard is written
_ASIDE = re.compile(r"\.writing-(?P<host>[0-9a-f]{32})-(?P<pid>\d+)-[0-9a-f]{32}\.(arrow|json)")
_LEFTOVER_SECONDS = 6 * 3600  # no writer takes this long over one shard


class Damage(Exception):
    """A shard does not match its manifest. The message is the reason."""


def make_row(key: str, tensors: dict[str, torch.Tensor], metadata: dict[str, Any]) -> dict[str, Any]:
    """The columns of one row: the key, the metadata as JSON, and the bytes, shape and dtype of each tensor.

    Raw bytes, because `Array3D` is ten times slower to read and returns float16 as float32.
    """
    row: dict[str, Any] = {"key": key, "metadata": canonical_json(metadata)}
    for name, tensor in tensors.items():
        tensor = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        assert tensor.isfinite().all(), f"the tensor {name} of the entry {key} is not finite"
        row[name] = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        row[f"{name}_shape"] = list(tensor.shape)
        row[f"{name}_dtype"] = _NAMES[tensor.dtype]
    return row


class Shard:
    """A shard that is verified and memory-mapped. Every read first checks that its file is as it was then.

    A process that reads a mapping beyond the end of its file is killed (SIGBUS), so a file that another program truncates must be
    noticed before. One that is removed or replaced stays mapped as it was. If only its time is new (`touch`), its bytes are
    verified again. The file is not kept open: a cache may have more shards than a process may open files.
    """

    def __init__(self, path: Path, verified: os.stat_result) -> None:
        import pyarrow

        self._path, self._stat = path, verified
        self._table = pyarrow.ipc.open_stream(pyarrow.memory_map(str(path))).read_all()

    def __len__(self) -> int:
        return self._table.num_rows

    def __reduce__(self) -> tuple[Any, ...]:
        return _mapped_again, (self._path,)

    def column(self, name: str) -> Any:
        """A column as an Arrow array. UserError if the file has changed since it was verified."""
        return self.table().column(name)

    def table(self) -> Any:
        """All columns as an Arrow table. UserError if the file has changed since it was verified."""
        try:
            now = os.stat(self._path)
        except OSError:
            now = self._stat
        is_same = (now.st_dev, now.st_ino) == (self._stat.st_dev, self._stat.st_ino)
        if is_same and (now.st_size, now.st_mtime_ns) != (self._stat.st_size, self._stat.st_mtime_ns):
            if now.st_size != self._stat.st_size or self._path.stem != f"shard-{_checksum_of(self._path)}":
                raise UserError(
                    f"the cache file {self._path} was changed by another program while it was in use: run the same command again, "
                    "which makes its entries again and goes on from the last checkpoint"
                )
            self._stat = now
        return self._table


def _mapped_again(path: Path) -> Shard:
    """A shard that was sent to another process: that process maps the file itself."""
    return Shard(path, os.stat(path))


def _checksum_of(path: Path) -> str | None:
    """The checksum of a file; None if it cannot be read."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        return _checksum(file)
    return None


def read_tensor(shard: Shard, name: str, row: int) -> torch.Tensor:
    """One tensor of one row, as a copy on the CPU. Bit-identical to the tensor given to `make_row`.

    UserError if the file has changed since it was verified.
    """
    column = shard.table().column
    shape = column(f"{name}_shape")[row].as_py()
    dtype = _DTYPES[column(f"{name}_dtype")[row].as_py()]
    data = np.frombuffer(column(name)[row].as_buffer(), np.uint8)
    assert data.size == math.prod(shape) * dtype.itemsize, f"{name}: {data.size} bytes for {shape} of {dtype}"
    tensor = torch.empty(shape, dtype=dtype)
    tensor.reshape(-1).view(torch.uint8).numpy()[:] = data
    return tensor


def write_shard(folder: Path, tensors: tuple[str, ...], rows: list[dict[str, Any]]) -> Path:
    """Writes rows of `make_row` as one shard. Returns the path of its manifest. After an OSError no shard was added."""
    from datasets import Features, List, Value
    from datasets.arrow_writer import ArrowWriter

    features = Features({"key": Value("string"), "metadata": Value("string")})
    for name in tensors:
        features[name] = Value("large_binary")
        features[f"{name}_shape"] = List(Value("int32"))
        features[f"{name}_dtype"] = Value("string")
    aside = aside_name(folder).with_suffix(".arrow")
    try:
        with aside.open("xb+") as file:
            writer = ArrowWriter(features=features, stream=file, writer_batch_size=_ROWS_PER_BATCH)
            for start in range(0, len(rows), _ROWS_PER_BATCH):
                batch = rows[start : start + _ROWS_PER_BATCH]
                writer.write_batch({column: [row[column] for row in batch] for column in features})
            writer.finalize(close_stream=False)
            fsync_file(file)
            size = file.tell()
            file.seek(0)
            checksum = _checksum(file)
        manifest = {"format": FORMAT_VERSION, "tensors": list(tensors), "rows": len(rows), "bytes": size}
        manifest["checksum"] = checksum
        manifest["libraries"] = {library: version(library) for library in ("datasets", "pyarrow", "torch")}
        manifest["seal"] = json_hash(manifest)
        with aside.with_suffix(".json").open("xb") as file:
            file.write(json.dumps(manifest, indent=2).encode())
            fsync_file(file)
        shard = folder / f"shard-{checksum}"
        for suffix in (".arrow", ".json"):
            os.replace(aside.with_suffix(suffix), shard.with_suffix(suffix))
            fsync_folder(folder)
    finally:
        for suffix in (".arrow", ".json"):
            aside.with_suffix(suffix).unlink(missing_ok=True)
    return shard.with_suffix(".json")


def aside_name(folder: Path) -> Path:
    """A free name for a file that is not complete yet: `remove_leftovers` removes it if this process is killed."""
    return folder / f".writing-{_host()}-{os.getpid()}-{uuid.uuid4().hex}.json"


def open_shard(manifest_path: Path, tensors: tuple[str, ...]) -> Shard:
    """Memory-maps one shard after verifying all of it against its manifest.

    Raises Damage if they do not match, and UserError if an intact shard has another format or other tensors, or if it
    cannot be read.
    """
    path = manifest_path.with_suffix(".arrow")
    try:
        manifest = _read_manifest(manifest_path)
        _require_format(manifest, tensors, path.parent)
        if not path.is_file() and path.exists():
            raise Damage(f"it is {kind_of(path)}")
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
            size = found.st_size
            if size != manifest["bytes"]:
                raise Damage(f"it has {size} bytes and should have {manifest['bytes']}")
            if _checksum(file) != manifest["checksum"]:
                raise Damage("its bytes are not those that were written")
            shard = Shard(path, found)
    except FileNotFoundError as error:
        raise Damage("the file is missing") from error
    except OSError as error:
        if error.errno == errno.EIO:
            raise Damage(f"the disk cannot read it: {error.strerror}") from error
        raise UserError(
            f"the cache file {path} cannot be read ({error.strerror}): make it readable or choose another cache folder"
        ) from error
    if len(shard) != manifest["rows"]:
        raise Damage(f"it has {len(shard)} rows and should have {manifest['rows']}")
    return shard


def set_aside(manifest_path: Path) -> None:
    """Renames both files of a damaged shard to `*.damaged`, if the folder is writable."""
    # The manifest first: if this is interrupted, the Arrow file has no manifest and is not part of the store.
    for path in (manifest_path, manifest_path.with_suffix(".arrow")):
        with contextlib.suppress(OSError):  # one of the two files may be missing
            os.replace(path, f"{path}.damaged")


def remove_leftovers(folder: Path) -> None:
    """Removes unfinished files of dead writers, and old Arrow files without a manifest."""
    import psutil

    for path in folder.iterdir():
        aside = _ASIDE.fullmatch(path.name)
        orphan = path.match("shard-*.arrow") and not path.with_suffix(".json").exists()
        dead = aside and aside["host"] == _host() and not psutil.pid_exists(int(aside["pid"]))
        with contextlib.suppress(OSError):  # another run removed it first, or the folder is read-only
            if dead or ((aside or orphan) and time.time() - path.stat().st_mtime > _LEFTOVER_SECONDS):
                path.unlink()


def canonical_json(value: Any) -> str:
    """Canonical JSON. Raises TypeError for a value that is not JSON, ValueError for a float that is not finite."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def json_hash(value: Any) -> str:
    """The blake2b hash of a JSON value, as 32 hex digits."""
    return _blake2b(canonical_json(value).encode()).hexdigest()


def _blake2b(data: bytes = b"") -> hashlib.blake2b:
    return hashlib.blake2b(data, digest_size=16)


def _checksum(file: BinaryIO) -> str:
    return hashlib.file_digest(file, _blake2b).hexdigest()


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = parse_json(read_regular(path), path.name)
        whole = isinstance(manifest, dict) and manifest.pop("seal", None) == json_hash(manifest)
    except UnreadableFile as error:
        if isinstance(error.__cause__, OSError):
            raise error.__cause__ from None
        raise Damage(f"its manifest {error.reason}") from error
    except ValueError as error:  # no JSON, or NaN
        raise Damage("its manifest cannot be read") from error
    if not whole or not {"format", "tensors", "rows", "bytes", "checksum"} <= manifest.keys():
        raise Damage("its manifest is not what was written")
    return manifest


def _require_format(manifest: dict[str, Any], tensors: tuple[str, ...], folder: Path) -> None:
    if manifest["format"] != FORMAT_VERSION:
        found, expected = f"format {manifest['format']}", f"format {FORMAT_VERSION}"
    elif manifest["tensors"] != list(tensors):
        found, expected = f"the tensors {', '.join(manifest['tensors'])}", ", ".join(tensors)
    else:
        return
    raise UserError(
        f"the cache folder {folder} holds entries of {found} where this run expects {expected}: "
        "choose another cache folder or delete this one"
    )


def _host() -> str:
    """Hash of the scope in which a process id is unique: the host and its pid namespace (a container may share the host name)."""
    namespace = ""
    with contextlib.suppress(OSError):  # Linux only
        namespace = os.readlink("/proc/self/ns/pid")
    return json_hash([socket.gethostname(), namespace])
