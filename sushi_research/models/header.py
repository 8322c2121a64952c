"""Reads the header of a .safetensors file: tensors, byte offsets and metadata. The rest of the file is not read.

safetensors checks the file itself. Two checks are added here: the header's size, because the header is parsed as a whole, and
duplicate names, because safetensors 0.8 silently keeps the second entry if both have the same offsets.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sushi_research.errors import UserError

PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle")
# Parsing can take 40 times the header's size in memory. Checkpoint headers are below 1 MiB; the header of a LoRA file that
# stores the tags of its training images can have a few MiB.
MAX_HEADER = 16 * 2**20
AGAIN = "download it again."
# The dtypes of weights that can be read, as safetensors names them.
DTYPES = ("F16", "BF16", "F32", "F64")


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file: dtype as safetensors names it, shape, and byte offsets from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """A file's header. `tensors` are in the order of their offsets."""

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]


class _Defect(Exception):
    """A problem with a file, with advice: the rest of a sentence that begins with the file's path."""


def require_safetensors(path: Path) -> None:
    """UserError unless the file name ends in .safetensors. The file is not opened, as it may be a pickle."""
    suffix = path.suffix.lower()
    if suffix in PICKLES:
        raise UserError(
            f"{_plain(path)} is a pickle ({suffix}), which can run code when it is loaded: "
            "take the model's .safetensors file."
        )
    if suffix != ".safetensors":
        raise UserError(f"{_plain(path)} is not a .safetensors file: take the model's .safetensors file.")


def read_header(path: Path) -> Header:
    """Reads and checks the header of a .safetensors file; UserError names the problem. The tensors' values are not checked."""
    try:
        _require_file(path)
        require_safetensors(path)
        raw, size = _read(path)
        stored = _checked(path, raw, size)
    except _Defect as defect:
        raise UserError(f"{_plain(path)} {defect}") from None
    metadata = stored.pop("__metadata__", None) or {}
    start = 8 + len(raw)
    tensors = {
        name: Tensor(entry["dtype"], tuple(entry["shape"]), *(start + offset for offset in entry["data_offsets"]))
        for name, entry in stored.items()
    }
    # An empty tensor comes before the tensor that begins at the same offset.
    return Header(path, dict(sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end))), metadata)


def _require_file(path: Path) -> None:
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise _Defect("does not exist: check the path.") from None
    except (OSError, ValueError) as error:
        raise _unreadable(error) from None
    if stat.S_ISDIR(mode):
        raise _Defect("is a folder: give the .safetensors file itself.")
    if not stat.S_ISREG(mode):  # opening a pipe would wait for a writer
        raise _Defect("is a pipe or a device: give the .safetensors file itself.")


def _read(path: Path) -> tuple[bytes, int]:
    """The bytes of the header, and the size of the file."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if length == 0 or 8 + length > size:
                file.seek(0)
                raise _Defect(_no_header(file.read(256), size, length))
            if length > MAX_HEADER:
                raise _Defect(
                    f"has a header of {length:,} bytes, more than the {MAX_HEADER:,} that are read: "
                    "take a copy of the model with less metadata."
                )
            return file.read(length), size
    except (OSError, ValueError) as error:
        raise _unreadable(error) from None


def _unreadable(error: Exception) -> _Defect:
    reason = getattr(error, "strerror", None) or error  # a ValueError is of a null character in the path
    return _Defect(f"cannot be read ({reason}): check the path and its permissions.")


def _no_header(start: bytes, size: int, length: int) -> str:
    """What a file is whose first eight bytes are not the length of a header within it; `start` is its first 256 bytes."""
    text = start.lstrip().lower()
    if size == 0:
        return f"is empty (0 bytes): {AGAIN}"
    if text.startswith(b"version https://git-lfs"):
        return "is a git-lfs pointer, not the file itself: run `git lfs pull`, or download the file."
    if text.startswith((b"<!doctype html", b"<html")):
        return "is a web page (HTML), not the file itself: download the file."
    if start[8:9] == b"{":
        return f"is cut short (its header has {length:,} bytes, and the file {size:,}): {AGAIN}"
    if start.startswith(b"PK\x03\x04"):
        return "is a zip archive, as PyTorch's pickles are, and not a safetensors file: take the model's .safetensors file."
    if re.match(rb"\x80[\x02-\x05]", start):
        return (
            "is a pickle under another name, which can run code when it is loaded: take the model's .safetensors file."
        )
    return f"is not a safetensors file (it begins with {start[:16]!r}): {AGAIN}"


def _checked(path: Path, raw: bytes, size: int) -> dict[str, Any]:
    """Parses the header's JSON after safetensors' own check of the file, and checks for duplicate names."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy"):
            error = None
    except (OSError, SafetensorError) as found:
        error = _plain(found).removeprefix("Error while deserializing header: ")
    if error and "unknown variant" in error:
        raise _Defect(f"holds a tensor of an unknown dtype ({error}): take the model's file in fp16, bf16 or fp32.")
    if error and "not fully covered" not in error:
        raise _Defect(f"is damaged ({error}): {AGAIN}")
    try:
        stored = json.loads(raw, object_pairs_hook=_reject_duplicates)
        end = max((entry["data_offsets"][1] for name, entry in stored.items() if name != "__metadata__"), default=0)
    except (ValueError, TypeError) as found:  # e.g. a number of 5,000 digits, or a list instead of an object
        raise _Defect(f"is damaged (its header is not as safetensors writes it: {_plain(found)}): {AGAIN}") from None
    surplus = size - 8 - len(raw) - end
    if surplus < 0:
        raise _Defect(f"is cut short ({-surplus:,} bytes are missing): {AGAIN}")
    if error:
        raise _Defect(f"is damaged ({surplus:,} bytes at its end belong to no tensor): {AGAIN}")
    return stored


def _reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise _Defect(f"is damaged (its header names '{_plain(twice)}' twice): {AGAIN}")
    return fields


def _plain(value: object) -> str:
    """A text from a file, or its path, as one printable line. Texts are shortened, because a name can have megabytes."""
    text = str(value)
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if isinstance(value, Path) or len(text) < 200 else f"{text[:150]}..."
