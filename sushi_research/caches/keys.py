"""The keys of cache entries: hashes of everything that determines an entry, as 32 hex digits, or packed in columns of 16 bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import numpy as np

# Increase this if decoding, resizing or the stored content changes. It is part of every key, so old entries are not read.
RECIPE = 1
# The NumPy type of a column of keys. They sort as their hex digits do.
PACKED = np.dtype("S16")


def entry_key(**recipe: Any) -> str:
    """The key of an entry: the hash of everything that determines its value, as 32 hex digits.

    `recipe` holds JSON values; a tuple counts as a list, and the order of dictionary keys does not matter.

    Raises TypeError for a value that is not JSON and ValueError for a float that is not finite.
    """
    return digest(canonical_json(recipe).encode()).hex()


def digest(data: bytes) -> bytes:
    """The blake2b hash, 16 bytes."""
    return hashlib.blake2b(data, digest_size=16).digest()


def canonical_json(value: Any) -> str:
    """Canonical JSON. Raises TypeError for a value that is not JSON, ValueError for a float that is not finite."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def packed(keys: Iterable[str]) -> np.ndarray:
    """Keys of 32 hex digits as a column [n] of PACKED. Raises ValueError for any other string."""
    joined = [*keys]
    data = bytes.fromhex("".join(joined))
    if any(len(key) != 32 for key in joined):
        raise ValueError("a key has 32 hex digits")
    return np.frombuffer(data, PACKED)


def hex_digits(keys: np.ndarray) -> list[str]:
    """The keys of a column of PACKED as 32 hex digits each."""
    text = np.ascontiguousarray(keys).tobytes().hex()
    return [text[start : start + 32] for start in range(0, len(text), 32)]


def owners(keys: np.ndarray, world: int) -> np.ndarray:
    """The process that computes each entry, int64 [n]: its key modulo the number of processes.

    It depends only on the key, so a concurrent run, which shortens the list of missing entries, does not change it.
    """
    halves = np.ascontiguousarray(keys).view(">u8").reshape(-1, 2).astype(np.uint64)
    # (high 2^64 + low) mod world, without a number of more than 64 bits; world is small.
    high, low, scale = halves[:, 0] % world, halves[:, 1] % world, 2**64 % world
    return ((high * np.uint64(scale) + low) % np.uint64(world)).astype(np.int64)
