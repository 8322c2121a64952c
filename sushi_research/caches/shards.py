"""The files of a cache store: shards, each an Arrow file and a manifest that can tell whether that file is whole.

`shard-<checksum>.arrow` is an Arrow file as `datasets` writes it. Beside it, `shard-<checksum>.json` states the format
version, the tensors of a row, the number of rows, size, checksum, library versions, and a seal: the checksum of the
manifest's own content. A shard is never changed and has the checksum of its bytes as its name, so writers need no
lock: they meet in one file only when they write the same bytes. Both files are written aside, synced and renamed, the
manifest last: what has no manifest is not part of the store.

Arrow itself notices neither a flipped bit nor a file that ends where a record batch ends; `open_shard` notices both.
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
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch

from sushi_research.errors import UserError
from sushi_research.files import fsync_file, fsync_folder

if TYPE_CHECKING:
    from datasets import Dataset

FORMAT_VERSION = 1

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "int64": torch.int64}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_ROWS_PER_BATCH = 32  # bounds the copies that Arrow makes while a shard is written
_ASIDE = re.compile(r"\.writing-(?P<host>[0-9a-f]{32})-(?P<pid>\d+)-[0-9a-f]{32}\.(arrow|json)")
_LEFTOVER_SECONDS = 6 * 3600  # no writer takes this long over one shard


class Damage(Exception):
    """A shard is not what its manifest says; the message is the reason."""


def make_row(key: str, tensors: dict[str, torch.Tensor], metadata: dict[str, Any]) -> dict[str, Any]:
    """The columns of one row: the key, the metadata as JSON, and the bytes, shape and dtype of each tensor.

    Raw bytes, because `Array3D` is read ten times slower and gives float16 back as float32.
    """
    row: dict[str, Any] = {"key": key, "metadata": canonical_json(metadata)}
    for name, tensor in tensors.items():
        tensor = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        assert tensor.isfinite().all(), f"the tensor {name} of the entry {key} is not finite"
        row[name] = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        row[f"{name}_shape"] = list(tensor.shape)
        row[f"{name}_dtype"] = _NAMES[tensor.dtype]
    return row


def read_tensor(shard: Dataset, name: str, row: int) -> torch.Tensor:
    """One tensor of one row, bit for bit as it was given to `make_row`; a copy on the CPU."""
    column = shard.data.column
    shape = column(f"{name}_shape")[row].as_py()
    dtype = _DTYPES[column(f"{name}_dtype")[row].as_py()]
    data = np.frombuffer(column(name)[row].as_buffer(), np.uint8)
    assert data.size == math.prod(shape) * dtype.itemsize, f"{name}: {data.size} bytes for {shape} of {dtype}"
    tensor = torch.empty(shape, dtype=dtype)
    tensor.reshape(-1).view(torch.uint8).numpy()[:] = data
    return tensor


def write_shard(folder: Path, tensors: tuple[str, ...], rows: list[dict[str, Any]]) -> Path:
    """Write rows of `make_row` as one shard and return the path of its manifest; OSError leaves nothing that counts."""
    from datasets import Features, List, Value
    from datasets.arrow_writer import ArrowWriter

    features = Features({"key": Value("string"), "metadata": Value("string")})
    for name in tensors:
        features[name] = Value("large_binary")
        features[f"{name}_shape"] = List(Value("int32"))
        features[f"{name}_dtype"] = Value("string")
    aside = folder / f".writing-{_host()}-{os.getpid()}-{uuid.uuid4().hex}.arrow"
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


def open_shard(manifest_path: Path, tensors: tuple[str, ...]) -> Dataset:
    """Map one shard into memory after comparing all of it with its manifest.

    Raises Damage where the two disagree, and UserError when the shard is whole but of another format or with other
    tensors, or when it may not be read.
    """
    from datasets import Dataset

    path = manifest_path.with_suffix(".arrow")
    try:
        manifest = _read_manifest(manifest_path)
        _require_format(manifest, tensors, path.parent)
        size = path.stat().st_size
        if size != manifest["bytes"]:
            raise Damage(f"it has {size} bytes and should have {manifest['bytes']}")
        with path.open("rb") as file:
            if _checksum(file) != manifest["checksum"]:
                raise Damage("its bytes are not those that were written")
        shard = Dataset.from_file(str(path))
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
    """Rename both files of a damaged shard to `*.damaged`, where the folder allows it."""
    # The manifest first: if this is cut short, what remains has no manifest and is not part of the store.
    for path in (manifest_path, manifest_path.with_suffix(".arrow")):
        with contextlib.suppress(OSError):  # one of the two may be the file that is missing
            os.replace(path, f"{path}.damaged")


def remove_leftovers(folder: Path) -> None:
    """Remove the unfinished files of writers that are dead, and old shards that were left without a manifest."""
    import psutil

    for path in folder.iterdir():
        aside = _ASIDE.fullmatch(path.name)
        orphan = path.match("shard-*.arrow") and not path.with_suffix(".json").exists()
        dead = aside and aside["host"] == _host() and not psutil.pid_exists(int(aside["pid"]))
        with contextlib.suppress(OSError):  # another run removed it first, or the folder is read-only
            if dead or ((aside or orphan) and time.time() - path.stat().st_mtime > _LEFTOVER_SECONDS):
                path.unlink()


def canonical_json(value: Any) -> str:
    """JSON in one spelling. Raises TypeError for what JSON does not have, ValueError for a float that is not finite."""
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
        manifest = json.loads(path.read_bytes())
    except ValueError as error:
        raise Damage("its manifest cannot be read") from error
    if not isinstance(manifest, dict) or manifest.pop("seal", None) != json_hash(manifest):
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
    """The space in which a process id means something: a machine, or a container, even of the machine's name."""
    namespace = Path("/proc/self/ns/pid")
    return json_hash([socket.gethostname(), os.readlink(namespace) if namespace.exists() else ""])
