"""The keys of the text cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow

from sushi_research.caches.keys import PACKED, RECIPE, canonical_json, digest, entry_key

# Texts whose keys are made at a time: bounds the memory for Python's objects.
_ROWS = 50_000


@dataclass(frozen=True, eq=False)
class TextEntries:
    """n distinct entries of the text cache, sorted by key: `keys` [n] of PACKED, and `texts`, an Arrow array of large_string."""

    keys: np.ndarray
    texts: pyarrow.Array

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, chosen: np.ndarray) -> TextEntries:
        """The entries at these numbers, or where a bool array [n] is true."""
        return TextEntries(self.keys[chosen], self.texts.take(pyarrow.array(np.arange(len(self))[chosen])))

    @classmethod
    def of(cls, keys: np.ndarray, texts: pyarrow.Array) -> TextEntries:
        """The entries with these keys [m], which may repeat, of these texts [m]."""
        distinct, first = np.unique(keys, return_index=True)
        return cls(distinct, texts.take(pyarrow.array(first)))


def text_key(caption: str, encoder_hashes: Sequence[str], settings: dict[str, Any]) -> str:
    """The key of a caption's embedding: its text, the hashes of encoders and tokenizers, and settings such as the layer."""
    return entry_key(recipe=RECIPE, caption=caption, encoders=list(encoder_hashes), settings=settings)


def prompt_key(prompt: str, encoder_hashes: Sequence[str], settings: dict[str, Any]) -> str:
    """The key of a long prompt's embedding, which is not that of the caption with the same text, because captions are cut."""
    return entry_key(recipe=RECIPE, chunked=prompt, encoders=list(encoder_hashes), settings=settings)


def text_keys(captions: pyarrow.Array, encoder_hashes: Sequence[str], settings: dict[str, Any]) -> np.ndarray:
    """`text_key` of each caption, as a column [n] of PACKED."""
    # "caption" comes first in the JSON, so all that follows is the same for every caption.
    rest = canonical_json({"encoders": list(encoder_hashes), "recipe": RECIPE, "settings": settings}).encode()[1:]
    keys = [
        b"".join([digest(b'{"caption":%b,%b' % (canonical_json(caption).encode(), rest)) for caption in part])
        for part in (captions[start : start + _ROWS].to_pylist() for start in range(0, len(captions), _ROWS))
    ]
    return np.frombuffer(b"".join(keys), PACKED)
