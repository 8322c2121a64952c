"""Some rows of a large array, which are read only where they are needed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class SelectedRows:
    """The rows `rows` [n] of `array` [N, ...], which may be mapped from a file. `np.asarray` makes a copy of all of them."""

    array: np.ndarray
    rows: np.ndarray

    @classmethod
    def of(cls, array: np.ndarray | SelectedRows) -> SelectedRows:
        """All rows of an array. What is selected already is returned as it is."""
        return array if isinstance(array, SelectedRows) else cls(array, np.arange(len(array), dtype=np.int32))

    def take(self, numbers: np.ndarray | slice) -> SelectedRows:
        """Some of these rows, without a copy of their content."""
        return SelectedRows(self.array, self.rows[numbers])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.array[self.rows[index]]

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        assert copy is not False, "the rows are copied"
        return self.array[self.rows].astype(dtype or self.array.dtype, copy=False)
