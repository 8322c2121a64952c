"""The index of a cache store: which shard and row has a key. Sorted columns, 24 bytes per entry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

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
        """The position of each key [m] in the index, int64 [m]; -1 if it is not there."""
        if not len(self):
            return np.full(len(keys), -1)
        # Halves of keys are numbers, which are sorted and searched ten times as fast as texts.
        halves = _first_half(keys)
        order = np.argsort(halves)
        positions = np.empty(len(keys), np.int64)
        positions[order] = np.searchsorted(self._first_halves, halves[order])
        positions = np.minimum(positions, len(self) - 1)
        found = self.keys[positions] == keys
        # Of two keys that share their first half, of which there will hardly ever be any, the other one may be meant.
        for row in np.flatnonzero(~found & (self._first_halves[positions] == halves)).tolist():
            positions[row] = min(np.searchsorted(self.keys, keys[row]), len(self) - 1)
            found[row] = self.keys[positions[row]] == keys[row]
        return np.where(found, positions, -1)

    @cached_property
    def _first_halves(self) -> np.ndarray:
        return _first_half(self.keys)

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


def _first_half(keys: np.ndarray) -> np.ndarray:
    """The first eight bytes of each key as a number, uint64, in the order of the keys."""
    return np.ascontiguousarray(keys).view(">u8")[::2].astype(np.uint64)
