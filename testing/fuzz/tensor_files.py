"""Hostile changes of safetensors files: of entries of the header, and well formed files with other names or values."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from random import Random
from typing import Any

# Bytes of an element. safetensors knows no other names.
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "C64": 8}
SIZES |= {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1}
ENDINGS = [
    *("lora_down.weight", "lora_up.weight", "lora_mid.weight", "lora_A.weight", "lora_B.weight", "lora.down.weight"),
    *(
        "alpha",
        "dora_scale",
        "lora_magnitude_vector",
        "diff",
        "diff_b",
        "w_norm",
        "b_norm",
        "scalar",
        "bias",
        "oft_diag",
    ),
    *(f"{kind}_w{number}_{side}" for kind in ("hada", "lokr") for number in "12" for side in "ab"),
    *("lokr_w1", "lokr_w2", "lokr_t2", "hada_t1", "hada_t2", "", "weight", "lora_A.default.weight", "a1.weight"),
]
NUMBERS: list[Any] = [0, -1, 1, 7, 2**31, 2**53, 2**63 - 1, 2**64, 1.5, True, None, "8", [], [0], -(2**40)]
# (dtype, shape, bytes) of each tensor, by name.
Tensors = dict[str, tuple[str, list[int], bytes]]


def parse(data: bytes) -> tuple[dict[str, Any], bytes] | None:
    """The header and the tensors' bytes of a safetensors file; None if it is none."""
    try:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length]) if 2 <= length < len(data) else None
    except ValueError:
        return None
    return (header, data[8 + length :]) if isinstance(header, dict) else None


def with_header(header: dict[str, Any], body: bytes) -> bytes:
    """A file with this header, whatever is in it."""
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def joined(tensors: Tensors, metadata: dict[str, str] | None = None) -> bytes:
    """A well formed file of these tensors."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(content)]}
        at += len(content)
    return with_header(header, b"".join(content for _, _, content in tensors.values()))


def split(header: dict[str, Any], body: bytes) -> Tensors:
    """The tensors of a sound file."""
    found: Tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            found[name] = entry["dtype"], entry["shape"], body[begin:end]
    return found


def change(data: bytes, others: Sequence[bytes], random: Random) -> bytes:
    """A file with one change: half of the time of an entry of the header, half of what a well formed file holds."""
    parsed = parse(data)
    if parsed is None or not set(parsed[0]) - {"__metadata__"}:
        return data
    header, body = parsed
    try:
        tensors = split(header, body)
        # What was changed before may be no file any more.
        is_sound = all(type(size) is int and size >= 0 for _, shape, _ in tensors.values() for size in shape)
        damaged = random.random() < 0.5 or not is_sound or not all(dtype in SIZES for dtype, _, _ in tensors.values())
    except (TypeError, ValueError, KeyError, AttributeError):
        tensors, damaged = {}, True
    if damaged:
        return with_header(_damaged(header, len(body), random), body)
    other = parse(random.choice(others))
    kinds = (_renamed, _retyped, _reshaped, _filled, _removed, _moved, _many)
    random.choice(kinds)(tensors, random)
    if other and random.random() < 0.2:  # two formats in one file
        tensors |= split(*other)
    return joined(tensors, header.get("__metadata__"))


def _damaged(header: dict[str, Any], size: int, random: Random) -> dict[str, Any]:
    """The header with one entry that no writer makes: overlapping, negative or distant offsets, other types, strange metadata."""
    names = sorted(set(header) - {"__metadata__"})
    name, other = random.choice(names), random.choice(names)
    whole = {each: dict(header[each]) if isinstance(header[each], dict) else {} for each in (name, other)}
    entry = header[name] = whole[name]
    kind = random.randrange(7)
    if kind == 0:
        entry["data_offsets"] = random.choice(
            [whole[other].get("data_offsets"), [random.choice(NUMBERS), size], [size, 0], 3]
        )
    elif kind == 1:
        low, high = (random.randint(-size, 2 * size) for _ in range(2))
        entry["data_offsets"] = [low, high]
    elif kind == 2:
        entry["shape"] = [random.choice(NUMBERS) for _ in range(random.randrange(6))]
    elif kind == 3:
        entry["dtype"] = random.choice([*SIZES, "F4", "f32", "", None, 7])
    elif kind == 4:
        header[name] = random.choice([None, [], 7, "x", {}, {"dtype": "F32"}])
    elif kind == 5:
        header["__metadata__"] = random.choice(
            [
                [],
                "x",
                {"ss_network_dim": 4},
                {"lora_adapter_metadata": "{" * 500},
                {"a": None},
                {"": "\0"},
                {"x": "y" * 100_000},
            ]
        )
    else:
        header["\ud800" if random.random() < 0.2 else "x" * random.choice((0, 1, 60_000))] = whole[other]
    return header


def _renamed(tensors: Tensors, random: Random) -> None:
    name = random.choice(list(tensors))
    stem, _, _ = name.partition(".")
    new = random.choice(
        [
            f"{stem}.{random.choice(ENDINGS)}",
            name.replace("unet", random.choice(("te", "te2", "transformer", "te3", ""))),
            name.replace("_", ".", random.randrange(1, 9)),
            name + random.choice((".default", "\0", " ", "\u202e", ".weight")),
            random.choice(list(tensors)),
        ]
    )
    tensors[new] = tensors.pop(name)


def _retyped(tensors: Tensors, random: Random) -> None:
    """Another dtype of the same number of elements."""
    name = random.choice(list(tensors))
    _, shape, content = tensors[name]
    dtype = random.choice(list(SIZES))
    count = len(content) // SIZES.get(tensors[name][0], 1)
    tensors[name] = dtype, shape, (content * 8)[: count * SIZES[dtype]].ljust(count * SIZES[dtype], b"\0")


def _reshaped(tensors: Tensors, random: Random) -> None:
    """Another shape of F32, of as many elements as it says: an absurd rank, a dimension of 0, more or fewer dimensions."""
    name = random.choice(list(tensors))
    old = tensors[name][1]
    shape = random.choice(
        [
            [],
            [0, *old[1:]],
            [*old, 1],
            [1, *old],
            old[::-1],
            [random.choice((1, 3, 300_000)), *old[1:]],
            [old[0] if old else 2, random.choice((1, 5, 100_000))],
            [1] * 9,
            [0, 2**62],
        ]
    )
    count = 1
    for size in shape:
        count *= size
    tensors[name] = "F32", shape, struct.pack("<f", 0.5) * min(count, 10**6)


def _filled(tensors: Tensors, random: Random) -> None:
    """Values that are no numbers, too large, or zero."""
    name = random.choice(list(tensors))
    dtype, shape, content = tensors[name]
    pattern = random.choice([b"\xff", b"\0", b"\x7f", b"\x00\x7c", b"\x80\x7f", b"\0\0\x80\x7f", b"\x01"])
    tensors[name] = dtype, shape, (pattern * len(content))[: len(content)]


def _removed(tensors: Tensors, random: Random) -> None:
    del tensors[random.choice(list(tensors))]


def _moved(tensors: Tensors, random: Random) -> None:
    """The contents of two tensors change places."""
    one, two = (random.choice(list(tensors)) for _ in range(2))
    tensors[one], tensors[two] = tensors[two], tensors[one]


def _many(tensors: Tensors, random: Random) -> None:
    """Thousands of modules more."""
    name = random.choice(list(tensors))
    ending = name.rpartition("lora")[2] if "lora" in name else name.rpartition(".")[2]
    value = random.choice([("F32", [0], b""), ("F32", [1], b"\0\0\0\0"), tensors[name]])
    tensors |= {f"{name[: -len(ending) or None]}{number}{ending}": value for number in range(random.choice((20, 3000)))}
