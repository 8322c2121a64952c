"""Damages and hostile changes of real files: bytes, lines, numbers and structure. Each is a function of a random generator."""

from __future__ import annotations

import json
import re
import struct
import zlib
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from testing.fuzz import tensor_files

MAGIC = [
    *(struct.pack("<q", value) for value in (0, 1, -1, 2**31 - 1, 2**31, 2**62, -(2**63))),
    *(struct.pack(">i", value) for value in (0, 1, -1, 2**31 - 1, -(2**31), 65536)),
    *(
        b"\0",
        b"\xff",
        b"\xff\xfe",
        b"\xfe\xff\0\0",
        b"\xef\xbb\xbf",
        b"\xed\xa0\x80",
        b"\x89PNG\r\n\x1a\n",
        b"PAR1",
        b"ARROW1\0\0",
    ),
]
TEXTS = [
    *(
        "!!python/object/apply:os.system [id]",
        "!custom x",
        "&a [*a, *a]",
        "*nowhere",
        "<<: {a: 1}",
        "? [a, b]",
        "- ",
        "{",
        "]",
    ),
    *(
        "\0",
        "\x1b[2J",
        "\u202e",
        "\ufeff",
        "\\ud800",
        "\u30ab\u3099",
        "%00",
        "..",
        "../../etc/passwd",
        "/dev/zero",
        "~nobody/x",
    ),
    *(
        "C:\\x",
        "a" * 5000,
        "[" * 2000,
        '{"a":' * 2000,
        "\n" * 2000,
        "null",
        "NaN",
        "-Infinity",
        "true",
        "''",
        '""',
        "\t",
        "#",
    ),
]
NUMBERS = [
    *("0", "-1", "1e309", "-1e309", "1e-400", "NaN", ".nan", ".inf", "0.1", "1_000", "0x10", "007", "", "x", "null"),
    *(str(2**31), str(2**63), str(2**64), "9" * 50, "9" * 5000),
]
VALUES: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        2**31,
        2**63,
        2**70,
        1e308,
        -1e-308,
        float("nan"),
        float("inf"),
        "",
        "x",
        "\0",
        "\ud800",
        "../x",
    ),
    *([], {}, [[]], [None], {"": None}, {"a": {"b": []}}, ["x"] * 200, "y" * 3000),
]


def mutate(seed: bytes, others: Sequence[bytes], random: Random) -> bytes:
    """The bytes of a file after one to four changes. Half of the changed PNGs get right checksums, so that more of them is read."""
    data = seed
    for _ in range(random.choice((1, 1, 1, 2, 3, 4))):
        kinds = _BYTES if b"\0" in seed[:4096] or random.random() < 0.2 else _TEXT
        if data[8:9] == b"{" and random.random() < 0.7:  # a safetensors file
            kinds = [tensor_files.change]
        data = random.choice(kinds)(data, others, random)
    if data.startswith(b"\x89PNG") and random.random() < 0.5:
        data = _with_checksums(data)
    return data


def _flip(data: bytes, others: Sequence[bytes], random: Random) -> bytes:
    if not data:
        return data
    changed = bytearray(data)
    # Headers are at the beginning, footers at the end: a third of the changes each.
    low, high = random.choice(((0, len(data)), (0, min(len(data), 256)), (max(0, len(data) - 512), len(data))))
    for _ in range(random.choice((1, 1, 2, 8))):
        changed[random.randrange(low, high)] ^= 1 << random.randrange(8)
    return bytes(changed)


def _magic(data: bytes, others: Sequence[bytes], random: Random) -> bytes:
    at, value = random.randrange(len(data) + 1), random.choice(MAGIC)
    return data[:at] + value + data[at + random.choice((0, len(value))) :]


def _length(data: bytes, others: Sequence[bytes], random: Random) -> bytes:
    """A number that may be a length or an offset, four bytes in a multiple of four that are less than 65,536, becomes another."""
    words = struct.unpack(f"<{len(data) // 4}i", data[: len(data) // 4 * 4])
    places = [index for index, word in enumerate(words) if 0 < word < 65536]
    if not places:
        return _magic(data, others, random)
    at = random.choice(places)
    value = random.choice(
        (-1, 0, 2**31 - 1, -(2**31), words[at] + 1, words[at] - 1, words[at] * 1000 % 2**31, len(data))
    )
    return data[: 4 * at] + struct.pack("<i", value) + data[4 * at + 4 :]


def _truncate(data: bytes, others: Sequence[bytes], random: Random) -> bytes:
    return data[: random.randrange(len(data) + 1)]


def _chunk(data: bytes, others: Sequence[bytes], random: Random) -> bytes:
    """A chunk is removed, repeated, moved, or replaced by one of another file."""
    start = random.randrange(len(data) + 1)
    end = min(len(data), start + random.choice((1, 4, 16, 64, 1024)))
    kind = random.randrange(4)
    if kind == 0:
        return data[:start] + data[end:]
    if kind == 1:
        return data[:end] + data[start:end] * random.choice((1, 2, 50)) + data[end:]
    if kind == 2:
        rest = data[:start] + data[end:]
        at = random.randrange(len(rest) + 1)
        return rest[:at] + data[start:end] + rest[at:]
    other = random.choice(others)
    return data[:start] + other[random.randrange(len(other) + 1) :][: end - start] + data[end:]


def _number(data: bytes, others: Sequence[bytes], random: Random) -> bytes:
    found = list(re.finditer(rb"-?\d+(\.\d+)?(e-?\d+)?", data))
    if not found:
        return _insert(data, others, random)
    match = random.choice(found)
    return data[: match.start()] + random.choice(NUMBERS).encode() + data[match.end() :]


def _insert(data: bytes, others: Sequence[bytes], random: Random) -> bytes:
    at = random.randrange(len(data) + 1)
    return data[:at] + random.choice(TEXTS).encode("utf-8", "surrogatepass") + data[at:]


def _lines(data: bytes, others: Sequence[bytes], random: Random) -> bytes:
    """A line is removed, repeated, swapped with another, or another file's."""
    lines = data.splitlines(keepends=True) or [b""]
    at, other = random.randrange(len(lines)), random.randrange(len(lines))
    kind = random.randrange(4)
    if kind == 0:
        del lines[at]
    elif kind == 1:
        lines[at] *= random.choice((2, 3))
    elif kind == 2:
        lines[at], lines[other] = lines[other], lines[at]
    else:
        lines.insert(at, random.choice(random.choice(others).splitlines(keepends=True) or [b""]))
    return b"".join(lines)


def _structure(data: bytes, others: Sequence[bytes], random: Random) -> bytes:
    """One value of JSON, or of one line of JSON lines, becomes another one, or one key is removed."""
    lines = data.splitlines() if data.count(b"\n{") else [data]
    at = random.randrange(len(lines)) if lines else 0
    try:
        content = json.loads(lines[at])
    except (ValueError, RecursionError, IndexError):
        return _number(data, others, random)
    places: list[tuple[Any, Any]] = []
    level = [content]
    while level:
        found = level.pop()
        keys = list(found) if isinstance(found, dict) else list(range(len(found))) if isinstance(found, list) else []
        places += [(found, key) for key in keys]
        level += [found[key] for key in keys]
    if not places:
        content = random.choice(VALUES)
    else:
        holder, key = random.choice(places)
        if isinstance(holder, dict) and random.random() < 0.2:
            del holder[key]
        else:
            holder[key] = random.choice(VALUES)
    lines[at] = json.dumps(content).encode()
    return b"\n".join(lines)


_BYTES: list[Callable[[bytes, Sequence[bytes], Random], bytes]] = [
    _flip,
    _flip,
    _magic,
    _length,
    _length,
    _truncate,
    _chunk,
]
_TEXT = [_flip, _truncate, _chunk, _number, _insert, _lines, _structure, _structure, _magic]


def _with_checksums(data: bytes) -> bytes:
    """A PNG whose chunks have the checksums of their content."""
    parts, at = [data[:8]], 8
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        body = data[at + 4 : at + 8 + length]
        if len(body) < 4 + length:
            break
        parts.append(data[at : at + 4] + body + zlib.crc32(body).to_bytes(4, "big"))
        at += 12 + length
    return b"".join([*parts, data[at:]])
