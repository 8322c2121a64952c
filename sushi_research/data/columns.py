"""Small helpers for Arrow columns."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow


def strings(texts: Sequence[str]) -> pyarrow.Array:
    """Texts as a column."""
    return pyarrow.array(texts, pyarrow.large_string())


def joined(parts: Sequence[pyarrow.Array | pyarrow.ChunkedArray]) -> pyarrow.Array:
    """Arrow arrays or chunked arrays as one array."""
    chunks = [chunk for part in parts for chunk in (part.chunks if isinstance(part, pyarrow.ChunkedArray) else [part])]
    return pyarrow.concat_arrays(chunks)
