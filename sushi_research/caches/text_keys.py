"""The keys of the text cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow

from sushi_research.caches.keys import PACKED, RECIPE, canonical_json, digest, entry_key

# Texts whose keys are made at a time: bounds the memory for Python's objects.
_ROWS = 50_000


def text_key(caption: str, encoder_hashes: Sequence[str], settings: dict[str, Any]) -> str:
    """The key of a caption's embedding: its text, the hashes of encoders and tokenizers, and settings such as the layer."""
    return entry_key(recipe=RECIPE, caption=caption, encoders=list(encoder_hashes), settings=settings)


def prompt_key(prompt: str, encoder_hashes: Sequence[str], settings: dict[str, Any]) -> str:
    """The key of a long prompt's embedding, which is not that of the caption with the same text, because captions are cut."""
    return entry_key(recipe=RECIPE, chunked=prompt, encoders=list(encoder_hashes), settings=settings)


def text_keys(
    captions: Sequence[str] | pyarrow.Array, encoder_hashes: Sequence[str], settings: dict[str, Any]
) -> np.ndarray:
    """`text_key` of each caption, as a column [n] of PACKED."""
    # "caption" comes first in the JSON, so all that follows is the same for every caption.
    rest = canonical_json({"encoders": list(encoder_hashes), "recipe": RECIPE, "settings": settings}).encode()[1:]
    keys = [
        b"".join([digest(b'{"caption":%b,%b' % (canonical_json(caption).encode(), rest)) for caption in part])
        for part in _parts(captions)
    ]
    return np.frombuffer(b"".join(keys), PACKED)


def _parts(captions: Sequence[str] | pyarrow.Array) -> Iterator[list[str]]:
    for start in range(0, len(captions), _ROWS):
        part = captions[start : start + _ROWS]
        yield part.to_pylist() if isinstance(part, pyarrow.Array | pyarrow.ChunkedArray) else part
