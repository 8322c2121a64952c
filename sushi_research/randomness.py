"""Random numbers as pure functions of seed and purpose.

Generators are never shared or reused: each use has its own counter-based stream (Philox, Salmon et al. 2011), keyed by a hash
of (scheme, seed, purpose, parts). So checkpoints need no random state, and a resumed run, a run on four processes and a run
with gradient accumulation see the same samples with the same noise. Numbers are generated on the CPU, because CUDA generators
differ between devices.
"""

from __future__ import annotations

import hashlib

import numpy as np

# Increment it when any random number changes. Runs of different schemes have different noise and cannot resume each other.
SCHEME = 1


def key(seed: int, purpose: str, *parts: int | str) -> np.random.Generator:
    """The generator for one purpose, for example `key(seed, "noise", epoch, image_hash, instance)`.

    `parts` are ints and strings. The hash includes their types, so `1` and `"1"` are different keys.
    """
    text = repr((SCHEME, int(seed), purpose, *parts))
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def normal(seed: int, purpose: str, *parts: int | str, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal noise, float32, of the given shape."""
    return key(seed, purpose, *parts).standard_normal(shape, dtype=np.float32)


def integer(seed: int, purpose: str, *parts: int | str, high: int) -> int:
    """A uniform integer in [0, high)."""
    return int(key(seed, purpose, *parts).integers(high))


def uniform(seed: int, purpose: str, *parts: int | str) -> float:
    """A uniform float in [0, 1)."""
    return float(key(seed, purpose, *parts).random())


def uniforms(seed: int, purpose: str, *parts: int | str, shape: tuple[int, ...]) -> np.ndarray:
    """Uniform numbers in [0, 1), float32, of the given shape."""
    return key(seed, purpose, *parts).random(shape, dtype=np.float32)


def torch_seed(seed: int, purpose: str, *parts: int | str) -> int:
    """A 63-bit seed for torch's generator, for code in libraries that uses it (dropout in an adapter layer)."""
    return integer(seed, purpose, *parts, high=2**63)
