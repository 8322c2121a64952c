"""The header of a .safetensors file: its tensors, where their bytes lie, and its metadata. The rest of the file is not read.

A strict reader of our own: safetensors' keeps one of two tensors of the same name, and its errors name no file and seldom a tensor.
"""

from __future__ import annotations

import json
import os
import reprlib
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sushi_research.errors import UserError

PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle")
# A header is parsed as a whole, which can take 40 times its size in memory. Those of checkpoints are below 1 MiB; that of a
# LoRA which carries the tags of its images has some MiB.
MAX_HEADER = 16 * 2**20
# More than any file has, and few enough that safetensors' own reader can count them.
MAX_BITS = 2**63
BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
FIELDS = ("dtype", "shape", "data_offsets")
AGAIN = "download it again."

# What a file says is shown in errors cut short and escaped: a name can be megabytes of anything.
_SHORT = reprlib.Repr()
_SHORT.maxstring, _SHORT.maxother, _SHORT.maxlevel = 120, 120, 2


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file: safetensors' name of its dtype, its shape, and the offsets of its bytes in the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a file says about itself, with the tensors in the order of their bytes."""

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]


class _Defect(Exception):
    """What is wrong with a file and what to do: the rest of a sentence that begins with the file's path."""


def require_safetensors(path: Path) -> None:
    """Refuses, by the name alone, a file that is no .safetensors file; a pickle is never opened."""
    suffix = path.suffix.lower()
    if suffix in PICKLES:
        raise UserError(
            f"{_line(path)} is a pickle ({suffix}), which can run code when it is loaded: "
            "take the model's .safetensors file."
        )
    if suffix != ".safetensors":
        raise UserError(f"{_line(path)} is no .safetensors file: take the model's .safetensors file.")


def read_header(path: Path) -> Header:
    """The header of a .safetensors file whose parts all fit together; UserError names what does not.

    Whether the tensors' numbers are sound is not looked at.
    """
    require_safetensors(path)
    try:
        raw, size = _read(path)
        stored = _parse(raw)
        metadata = _metadata(stored.pop("__metadata__", {}))
        start = 8 + len(raw)
        found = {name: _tensor(name, fields, start) for name, fields in stored.items()}
        # As safetensors sorts: an empty tensor comes before the one whose bytes begin where it lies.
        tensors = dict(sorted(found.items(), key=lambda item: (item[1].begin, item[1].end)))
        _require_whole(tensors, start, size)
    except _Defect as defect:
        raise UserError(f"{_line(path)} {defect}") from None
    return Header(path, tensors, metadata)


def _line(path: Path) -> str:
    """A path as one line: file names may hold newlines."""
    return str(path) if str(path).isprintable() else repr(str(path))


def _read(path: Path) -> tuple[bytes, int]:
    """The bytes of the header, and the size of the file."""
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise _Defect("is a folder: give the .safetensors file itself.")
        if not stat.S_ISREG(mode):  # opening a pipe would wait for a writer
            raise _Defect("is a pipe or a device: give the .safetensors file itself.")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if length == 0 or 8 + length > size:
                raise _Defect(f"is cut short or is no safetensors file: {AGAIN}")
            if length > MAX_HEADER:
                raise _Defect(
                    f"has a header of {length:,} bytes, more than the {MAX_HEADER:,} that are read: "
                    "take a copy of the model with less metadata."
                )
            raw = file.read(length)
    except FileNotFoundError:
        raise _Defect("does not exist: check the path.") from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        reason = getattr(error, "strerror", None) or error
        raise _Defect(f"cannot be read ({reason}): check the path and its permissions.") from None
    if len(raw) < length:
        raise _Defect(f"became shorter while it was read: {AGAIN}")
    return raw, size


def _parse(raw: bytes) -> dict[str, Any]:
    """The header as JSON, where no object names a key twice."""
    try:
        stored = json.loads(raw.decode(), object_pairs_hook=_unique, parse_int=_integer)
    except (ValueError, RecursionError) as error:
        raise _Defect(f"is damaged (its header is not valid JSON: {error}): {AGAIN}") from None
    if not isinstance(stored, dict):
        raise _Defect(f"is damaged (its header is no JSON object): {AGAIN}")
    return stored


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise _Defect(f"is damaged (its header names {_SHORT.repr(twice)} twice): {AGAIN}")
    return fields


def _integer(text: str) -> int | float:
    """An integer of 64 bits; as in safetensors' own reader -0 and longer ones become floats, which no size may be."""
    return int(text) if len(text) < 20 and text != "-0" else float(text)


def _is_text(value: Any) -> bool:
    """Whether it is a string that UTF-8 can hold: an escape in JSON can write half of a surrogate pair."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _metadata(stored: Any) -> dict[str, str]:
    if not isinstance(stored, dict):
        raise _Defect(f"is damaged (its __metadata__ is no JSON object): {AGAIN}")
    for key, value in stored.items():
        if not (_is_text(key) and _is_text(value)):
            raise _Defect(f"is damaged ({_SHORT.repr(key)} in its __metadata__ is not text): {AGAIN}")
    return stored


def _tensor(name: str, fields: Any, start: int) -> Tensor:
    """The entry of one tensor, whose offsets count from `start`."""

    def damaged(what: str) -> _Defect:
        return _Defect(f"is damaged (tensor {_SHORT.repr(name)} {what}): {AGAIN}")

    if not _is_text(name):
        raise damaged("has a name that is not text")
    if not isinstance(fields, dict) or fields.keys() != set(FIELDS):
        has = sorted(fields) if isinstance(fields, dict) else fields
        raise damaged(f"has {_SHORT.repr(has)} instead of dtype, shape and data_offsets")
    dtype, shape, offsets = (fields[field] for field in FIELDS)
    if not isinstance(dtype, str) or dtype not in BITS:
        raise _Defect(
            f"holds tensor {_SHORT.repr(name)} in the unknown dtype {_SHORT.repr(dtype)}: "
            "take the model's file in fp16, bf16 or fp32."
        )
    if not _are_sizes(shape):
        raise damaged(f"has the shape {_SHORT.repr(shape)}, which is no list of sizes")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise damaged(f"has the data_offsets {_SHORT.repr(offsets)}, which are no begin and end")
    bits = BITS[dtype]
    for size in shape:
        bits *= max(size, 1)  # safetensors may overflow before it comes to a zero
        if bits > MAX_BITS:
            raise damaged(f"has the shape {_SHORT.repr(shape)}, larger than any file")
    bits *= 0 not in shape
    begin, end = offsets
    if bits != 8 * (end - begin):
        raise damaged(f"has {end - begin} bytes, and {dtype} of shape {_SHORT.repr(shape)} takes {bits / 8:.15g}")
    return Tensor(dtype, tuple(shape), start + begin, start + end)


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)  # a bool is none


def _require_whole(tensors: dict[str, Tensor], start: int, size: int) -> None:
    """Refuses tensors, in the order of their bytes, that do not fill the file from `start` to its end exactly."""
    end = start
    before: str | None = None
    for name, tensor in tensors.items():
        if tensor.begin != end:
            gap = f"begins {tensor.begin - end} bytes after" if tensor.begin > end else "overlaps"
            place = "the header" if before is None else f"tensor {_SHORT.repr(before)}"
            raise _Defect(f"is damaged (tensor {_SHORT.repr(name)} {gap} {place}): {AGAIN}")
        end, before = tensor.end, name
    if end > size:
        first = next(name for name, tensor in tensors.items() if tensor.end > size)
        raise _Defect(f"is cut short ({end - size:,} bytes are missing, from tensor {_SHORT.repr(first)} on): {AGAIN}")
    if end < size:
        raise _Defect(f"is damaged ({size - end:,} bytes at its end belong to no tensor): {AGAIN}")
