"""Small helpers for Arrow columns."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow


def strings(texts: Sequence[str]) -> pyarrow.Array:
    """Texts as a column."""
    return pyarrow.array(texts, pyarrow.large_string())


def joined(parts: Sequence[pyarrow.Array | pyarrow.ChunkedArray]) -> pyarrow.Array:
    """Arrow arrays or chunked arrays as one array."""
    chunks = [chunk for part in parts for chunk in (part.chunks if isinstance(part, pyarrow.ChunkedArray) else [part])]
    return pyarrow.concat_arrays(chunks)


def distinct_numbers(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the distinct ones of integers [n], sorted; the place of each integer among them [n] int64), without sorting all."""
    encoded = pyarrow.array(numbers).dictionary_encode()
    values, places = np.unique(encoded.dictionary.to_numpy(), return_inverse=True)
    return values, places[encoded.indices.to_numpy()]
