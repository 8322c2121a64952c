"""The files of a cache store: shards, each an Arrow file and a manifest that says where its rows are and what their bytes are.

`shard-<hash>.arrow` is an Arrow file as `datasets` writes it, for whoever wants to look at a cache. The suite reads it by its
manifest, `shard-<hash>.json`, which has the place, size and checksum of every row, and is named after the hash of its own bytes.
So a manifest needs no seal, opening a store reads no Arrow file, and a row is verified when it is read. Nothing is mapped into
memory: a process that reads a mapping beyond the end of a truncated file, or of a sector that the disk cannot read, is killed.

A shard never changes, and two writers use the same name only for the same rows at the same places. So writers need no lock. Both
files are written under temporary names, synced and renamed, the manifest last. An Arrow file without a manifest is not part of
the store.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from sushi_research.caches.keys import PACKED, canonical_json, digest, hex_digits, packed
from sushi_research.errors import UserError
from sushi_research.files import fsync_file, fsync_folder
from sushi_research.temporaries import temporary_file
from sushi_research.user_files import UnreadableFile, kind_of, parse_json, read_regular

FORMAT_VERSION = 2

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "int64": torch.int64}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_ROWS_PER_BATCH = 32  # bounds the memory for Arrow's copies while a shard is written
# Of 100,000 rows of many tensors it has some 20 MiB.
_MOST_MANIFEST = 2**30


class Damage(Exception):
    """A shard, or a row of it, is not what was written. The message is the reason."""


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


@dataclass(frozen=True)
class Manifest:
    """What a manifest says about the n rows of its shard.

    `places` are the columns "key" [n] of PACKED, "checksum" [n] of PACKED, "kind" [n] int32, "metadata_bytes" [n] int32, and the
    offsets in the Arrow file, [n] int64 each, of "metadata" and, by "@name", of each tensor's bytes. `kinds` are the distinct
    combinations of (dtype, shape) of the tensors of a row, in the order of `tensors`. `size` is the Arrow file's, in bytes.
    """

    tensors: tuple[str, ...]
    size: int
    kinds: list[list[tuple[str, list[int]]]]
    places: dict[str, np.ndarray]

    @property
    def keys(self) -> np.ndarray:
        return self.places["key"]


_COLUMNS = {"key": PACKED, "checksum": PACKED, "kind": "<i4", "metadata_bytes": "<i4", "metadata": "<i8"}


def write_shard(folder: Path, tensors: tuple[str, ...], rows: list[dict[str, Any]]) -> Path:
    """Writes rows of `make_row` as one shard. Returns the path of its manifest. After an OSError no shard was added."""
    from datasets import Features, List, Value
    from datasets.arrow_writer import ArrowWriter

    features = Features({"key": Value("string"), "metadata": Value("string")})
    for name in tensors:
        features[name] = Value("large_binary")
        features[f"{name}_shape"] = List(Value("int32"))
        features[f"{name}_dtype"] = Value("string")
    with temporary_file(folder / "shard.arrow") as (file, aside):
        writer = ArrowWriter(features=features, stream=file, writer_batch_size=_ROWS_PER_BATCH)
        for start in range(0, len(rows), _ROWS_PER_BATCH):
            batch = rows[start : start + _ROWS_PER_BATCH]
            writer.write_batch({column: [row[column] for row in batch] for column in features})
        writer.finalize(close_stream=False)
        fsync_file(file)
        data = json.dumps(_describe(aside, tensors, rows)).encode()
        shard = folder / f"shard-{digest(data).hex()}"
        with temporary_file(folder / "shard.json") as (manifest, manifest_aside):
            manifest.write(data)
            fsync_file(manifest)
            for opened, name, suffix in ((file, aside, ".arrow"), (manifest, manifest_aside, ".json")):
                if os.name == "nt":
                    opened.close()  # an open file cannot be renamed there
                os.replace(name, shard.with_suffix(suffix))
                fsync_folder(folder)
    return shard.with_suffix(".json")


def _describe(path: Path, tensors: tuple[str, ...], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The content of the manifest of an Arrow file that is written. Raises OSError if the file does not have these rows."""
    import pyarrow

    whole = pyarrow.memory_map(str(path)).read_buffer()
    places = _places(whole, tensors)
    kinds: dict[str, int] = {}
    numbers, checksums, metadata_bytes = [], [], []
    for number, row in enumerate(rows):
        kind = [(row[f"{name}_dtype"], row[f"{name}_shape"]) for name in tensors]
        parts = {"metadata": row["metadata"].encode()} | {f"@{name}": row[name] for name in tensors}
        for name, data in parts.items():
            start = int(places[name][number])
            if bytes(whole[start : start + len(data)]) != data:
                raise OSError(errno.EIO, "what was written is read back with other bytes")
        metadata, *data = parts.values()
        numbers.append(kinds.setdefault(json.dumps(kind), len(kinds)))
        checksums.append(checksum(row["key"], metadata, kind, data))
        metadata_bytes.append(len(metadata))
    places |= {"key": packed(row["key"] for row in rows), "checksum": packed(checksums)}
    places |= {"kind": np.array(numbers), "metadata_bytes": np.array(metadata_bytes)}
    return {
        "format": FORMAT_VERSION,
        "tensors": list(tensors),
        "rows": len(rows),
        "bytes": whole.size,
        "libraries": {library: version(library) for library in ("datasets", "pyarrow", "torch")},
        "kinds": [json.loads(kind) for kind in kinds],
        "places": {
            name: base64.b64encode(column.astype(_type(name)).tobytes()).decode() for name, column in places.items()
        },
    }


def _type(column: str) -> np.dtype | str:
    """The type of a column of places."""
    return _COLUMNS.get(column, "<i8")


def _places(whole: Any, tensors: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The offsets in an Arrow file of each row's metadata ("metadata") and of each tensor ("@name"), in bytes, [n] int64.

    `whole` is the file as an Arrow buffer. A column's buffers are parts of it, so their addresses give their places.
    """
    import pyarrow

    found: dict[str, list[np.ndarray]] = {name: [] for name in ("metadata", *(f"@{tensor}" for tensor in tensors))}
    for batch in pyarrow.ipc.open_stream(whole):
        for name, parts in found.items():
            _, offsets, data = batch.column(name.removeprefix("@")).buffers()
            width = np.int32 if name == "metadata" else np.int64
            starts = np.frombuffer(offsets, width)[: batch.num_rows].astype(np.int64)
            parts.append(starts + (data.address - whole.address if data else 0))
    return {name: np.concatenate(parts) for name, parts in found.items()}


def checksum(key: str, metadata: bytes, kind: list[Any], tensors: list[Any]) -> str:
    """The blake2b hash of a row, as 32 hex digits: its key, its metadata, and the dtype, shape and bytes of each tensor."""
    whole = hashlib.blake2b(canonical_json([key, len(metadata), kind]).encode() + b"\n" + metadata, digest_size=16)
    for data in tensors:
        whole.update(data)
    return whole.hexdigest()


def read_manifest(path: Path, tensors: tuple[str, ...]) -> Manifest:
    """Reads and verifies a manifest. Does not look at its Arrow file.

    Raises Damage if it is not what was written, and UserError if it has another format or other tensors, or cannot be read.
    """
    with _reading(path):
        try:
            data = read_regular(path, _MOST_MANIFEST)
        except UnreadableFile as error:
            if isinstance(error.__cause__, OSError):
                raise error.__cause__ from None
            raise Damage(f"its manifest {error.reason}") from error
    if digest(data).hex() != path.stem.removeprefix("shard-"):
        if _is_first_format(data):
            raise _other(path.parent, "format 1", f"format {FORMAT_VERSION}")
        raise Damage("its manifest is not what was written")
    manifest = json.loads(data)
    if manifest["format"] != FORMAT_VERSION:
        raise _other(path.parent, f"format {manifest['format']}", f"format {FORMAT_VERSION}")
    if manifest["tensors"] != list(tensors):
        raise _other(path.parent, f"the tensors {', '.join(manifest['tensors'])}", ", ".join(tensors))
    places = {name: np.frombuffer(base64.b64decode(column), _type(name)) for name, column in manifest["places"].items()}
    return Manifest(tensors, manifest["bytes"], manifest["kinds"], places)


def require_size(manifest: Manifest, path: Path) -> None:
    """Raises Damage if the Arrow file at `path` is missing or has another size, and UserError if it cannot be looked at."""
    with _reading(path):
        size = path.stat().st_size
        if not path.is_file():
            raise Damage(f"it is {kind_of(path)}")
    if size != manifest.size:
        raise Damage(f"it has {size} bytes and should have {manifest.size}")


def read_row(file: BinaryIO, manifest: Manifest, row: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors by name, on the CPU, and the metadata of one row, verified. Bit-identical to what was given to `make_row`.

    Raises Damage if its bytes are not those that were written, or the disk cannot read them.
    """
    places = manifest.places
    kind = manifest.kinds[places["kind"][row]]
    metadata = bytearray(int(places["metadata_bytes"][row]))
    tensors, parts = {}, []
    with _reading(file.name):
        _read_at(file, int(places["metadata"][row]), memoryview(metadata))
        for name, (dtype, shape) in zip(manifest.tensors, kind, strict=True):
            tensors[name] = torch.empty(shape, dtype=_DTYPES[dtype])
            parts.append(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
            _read_at(file, int(places[f"@{name}"][row]), parts[-1])
    [key, expected] = (hex_digits(places[name][row : row + 1])[0] for name in ("key", "checksum"))
    if checksum(key, bytes(metadata), kind, parts) != expected:
        raise Damage(f"the bytes of row {row} are not those that were written")
    return tensors, json.loads(metadata)


def _read_at(file: BinaryIO, offset: int, into: memoryview) -> None:
    """Fills `into` from the file at `offset`. Raises Damage at the end of the file."""
    file.seek(offset)
    done = 0
    while done < len(into):
        count = file.readinto(into[done:])
        if not count:
            raise Damage("it was truncated")
        done += count


def set_aside(manifest_path: Path) -> bool:
    """Renames both files of a damaged shard to `*.damaged`. Returns whether the store no longer has it."""
    # The manifest first: if this is interrupted, the Arrow file has no manifest and is not part of the store.
    for path in (manifest_path, manifest_path.with_suffix(".arrow")):
        with contextlib.suppress(OSError):  # one of the two files may be missing, and the folder may be read-only
            os.replace(path, f"{path}.damaged")
    return not manifest_path.exists()


@contextlib.contextmanager
def _reading(path: Path | str) -> Iterator[None]:
    """Turns what the disk cannot read into Damage, and any other error but a missing file into UserError."""
    try:
        yield
    except FileNotFoundError as error:
        raise Damage("the file is missing") from error
    except OSError as error:
        if error.errno == errno.EIO:
            raise Damage(f"the disk cannot read it: {error.strerror}") from error
        raise UserError(
            f"the cache file {path} cannot be read ({error.strerror}): make it readable or choose another cache folder"
        ) from error


def _is_first_format(data: bytes) -> bool:
    """Whether this is a manifest of format 1, which was not named after its own bytes."""
    try:
        manifest = parse_json(data, "the manifest")
    except UserError:
        return False
    return isinstance(manifest, dict) and manifest.get("format") == 1 and "seal" in manifest


def _other(folder: Path, found: str, expected: str) -> UserError:
    return UserError(
        f"the cache folder {folder} holds entries of {found} where this run expects {expected}: "
        "choose another cache folder or delete this one"
    )
