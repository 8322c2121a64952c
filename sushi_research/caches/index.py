"""The index of a cache store: which shard and row has a key. Sorted columns, 24 bytes per entry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from sushi_research.caches.keys import PACKED


@dataclass(frozen=True)
class Index:
    """`keys` [n] of PACKED, sorted and distinct; `shards` and `rows` [n] int32: the number of the shard, and the row in it."""

    keys: np.ndarray = field(default_factory=lambda: np.empty(0, PACKED))
    shards: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    rows: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))

    def __len__(self) -> int:
        return len(self.keys)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """The position of each key [m] in the index, int64 [m]; -1 if it is not there. Sorted keys are faster."""
        if not len(self):
            return np.full(len(keys), -1)
        positions = np.minimum(np.searchsorted(self.keys, keys), len(self) - 1)
        return np.where(self.keys[positions] == keys, positions, -1)

    def with_shards(self, columns: Sequence[tuple[int, np.ndarray]]) -> Index:
        """An index that also has the keys of these shards: (its number, its keys by row), in their order.

        A key that is known keeps its place, and of several new places the first one counts.
        """
        if not columns:
            return self
        keys = np.concatenate([self.keys, *(column for _, column in columns)])
        shards = [np.full(len(column), number, np.int32) for number, column in columns]
        rows = [np.arange(len(column), dtype=np.int32) for _, column in columns]
        # The first of equal keys: np.unique sorts stably.
        distinct, first = np.unique(keys, return_index=True)
        return Index(distinct, np.concatenate([self.shards, *shards])[first], np.concatenate([self.rows, *rows])[first])
