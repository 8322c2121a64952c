"""The index of a store, remembered: the name of a manifest is the hash of its content, so the names tell whether it is the same."""

from __future__ import annotations

import stat
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from sushi_research.caches.index import Index
from sushi_research.caches.keys import entry_key
from sushi_research.remembered import Remembered

# By name of a shard: the bytes of its Arrow file, and its number of rows.
Sizes = dict[str, tuple[int, int]]


def recall(
    remembered: Remembered, folder: Path, tensors: Sequence[str], names: Sequence[str]
) -> tuple[Index, Sizes] | None:
    """The index of these shards in their order, and their sizes; None if it is not known, or a file has another size by now."""
    known = remembered.find(_kind(folder), _key(tensors, names)) if names else None
    if known is None:
        return None
    found = [_size(folder / f"{name}.arrow") for name in names]
    if found != known["sizes"].tolist():
        return None
    sizes = dict(zip(names, zip(found, known["counts"].tolist(), strict=True), strict=True))
    return Index(known["keys"], known["shards"], known["rows"]), sizes


def remember(remembered: Remembered, folder: Path, tensors: Sequence[str], index: Index, sizes: Mapping) -> None:
    """Stores the index of the shards in `sizes`, in their order, unless it is known."""
    key = _key(tensors, list(sizes))
    if sizes and remembered.find(_kind(folder), key) is None:
        found, counts = np.array(list(sizes.values()), np.int64).T
        columns = {"keys": index.keys, "shards": index.shards, "rows": index.rows}
        remembered.put(_kind(folder), key, columns | {"sizes": found, "counts": counts})


def _kind(folder: Path) -> str:
    return f"index-{folder.name.replace('_', '-')}"


def _key(tensors: Sequence[str], names: Sequence[str]) -> str:
    return entry_key(names=list(names), tensors=list(tensors))


def _size(path: Path) -> int:
    """The bytes of a file; -1 if there is none."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return -1
    return status.st_size if stat.S_ISREG(status.st_mode) else -1
