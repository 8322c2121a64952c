"""evaluation.parquet and the other result files: one row per evaluated step, image and noise sample of one measured set."""

from __future__ import annotations

import io
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from sushi_research.errors import UserError, first_line
from sushi_research.evaluation.result_arrays import COLUMNS, ResultArrays, arrays_of, refused, row_names
from sushi_research.files import remove, write_atomic
from sushi_research.user_files import UnreadableFile, read_regular

if TYPE_CHECKING:
    import pyarrow

logger = logging.getLogger(__name__)

# Far above what a run writes: 100 evaluations of 10,000 images with 8 noise samples are about 100 MB.
MOST_BYTES = 2**31
# A few bytes can hold a billion equal rows.
MOST_ROWS = 2**25
# Increment it when the columns or their meaning change.
FORMAT = 2
# Fewest images for a test between two runs: the coverage of its intervals was measured for this number and above, and with
# fewer images too many bootstrap resamples contain one image only.
MIN_IMAGES = 8


class Measured(Protocol):
    """The set that results belong to: N names (image hashes or captions), `noise_samples` timesteps of each, and the set's hash."""

    names: tuple[str, ...]
    noise_samples: int
    hash: str

    def timesteps(self) -> np.ndarray:
        """[N, noise samples] int64."""
        ...


class Results:
    """One row per step, image and noise sample, with the base's loss on the same noise. A step is complete or absent."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._has_rows = False  # whether this object wrote some

    def read(self) -> pyarrow.Table | None:
        """All rows, equal rows once; None if nothing was evaluated yet. UserError as `arrays`."""
        table = self._table()
        arrays = None if table is None else arrays_of(self.path, table)
        return table if arrays is None else table.take(arrays.rows)

    def arrays(self) -> ResultArrays | None:
        """All results by step, name and noise sample; None if there are none.

        UserError if the file is damaged, which its checksums show too, or if its rows are not those of complete steps
        (`arrays_of`).
        """
        table = self._table()
        return None if table is None else arrays_of(self.path, table)

    def set_hash(self) -> str | None:
        """The hash of the set that the results belong to; None if nothing was evaluated yet."""
        table = self._table()
        return None if table is None else table.schema.metadata[b"set_hash"].decode(errors="replace")

    def steps(self) -> list[int]:
        """The steps that were evaluated."""
        arrays = self.arrays()
        return [] if arrays is None else list(arrays.steps)

    def loss_at(self, measured: Measured, step: int) -> np.ndarray | None:
        """[N, noise samples] of a step, in the order of `measured.names`; None if it was not evaluated on this set."""
        arrays = self._of(measured)
        if arrays is None or step not in arrays.steps:
            return None
        return arrays.loss[arrays.steps.index(step)][self._order(arrays, measured)]

    def base_loss(self, measured: Measured) -> np.ndarray | None:
        """[N, noise samples]: the base's losses, which every step repeats; None if nothing was evaluated on this set."""
        arrays = self._of(measured)
        return None if arrays is None else arrays.base[self._order(arrays, measured)]

    def _of(self, measured: Measured) -> ResultArrays | None:
        return self.arrays() if self.set_hash() == measured.hash else None

    def _order(self, arrays: ResultArrays, measured: Measured) -> list[int]:
        """The places of the measured names in the arrays."""
        wanted, places = row_names(measured.names), {name: place for place, name in enumerate(arrays.names)}
        if places.keys() != set(wanted) or arrays.base.shape[1] != measured.noise_samples:
            raise refused(self.path, "does not hold the images and noise samples of its validation set")
        return [places[name] for name in wanted]

    def append(self, measured: Measured, step: int, loss: np.ndarray, base: np.ndarray) -> None:
        """Adds a step's losses and the base's, [N, noise samples] each. Overwrites earlier results of the step; discards rows of
        a different set."""
        import pyarrow
        import pyarrow.compute as compute

        count = len(measured.names) * measured.noise_samples
        table = pyarrow.table(
            {
                "step": np.full(count, step, np.int32),
                "image": np.repeat(row_names(measured.names), measured.noise_samples),
                "noise_sample": np.tile(np.arange(measured.noise_samples, dtype=np.int16), len(measured.names)),
                "timestep": measured.timesteps().astype(np.int16).ravel(),
                "loss": loss.astype(np.float32).ravel(),
                "base_loss": base.astype(np.float32).ravel(),
            }
        ).replace_schema_metadata(
            {
                "set_hash": measured.hash,
                "scheme": str(FORMAT),
                "names": str(len(measured.names)),
                "noise_samples": str(measured.noise_samples),
            }
        )
        before = self.read()
        if self._has_rows and (before is None or self.is_of_another(measured)):
            logger.warning("%s was removed or replaced: results of earlier steps are lost", self.path)
        self._has_rows = True
        if before is not None and not self.is_of_another(measured):
            kept = before.filter(compute.not_equal(before["step"], step))
            table = pyarrow.concat_tables([kept, table]).sort_by([("step", "ascending")])
        self._write(table)

    def cut_back(self, step: int) -> None:
        """Removes results after `step`, from which the run resumes; -1 removes everything."""
        import pyarrow.compute as compute

        if step < 0:
            remove(self.path)
            return
        table = self.read()
        if table is not None:
            self._write(table.filter(compute.less_equal(table["step"], step)))

    def is_of_another(self, measured: Measured) -> bool:
        """Whether the stored results belong to another set."""
        return self.set_hash() not in (None, measured.hash)

    def _table(self) -> pyarrow.Table | None:
        import pyarrow.parquet

        if not os.path.lexists(self.path):
            return None
        try:
            data = read_regular(self.path, MOST_BYTES)
        except UnreadableFile as error:
            raise refused(self.path, error.reason) from error
        try:
            # Not read_table: it turns folder names such as "lora.rank=4" into columns.
            with pyarrow.parquet.ParquetFile(io.BytesIO(data), page_checksum_verification=True) as file:
                if file.metadata.num_rows > MOST_ROWS:
                    raise refused(self.path, f"has {file.metadata.num_rows:,} rows, and {MOST_ROWS:,} are read")
                table = file.read()
            table.validate(full=True)
        except UserError:
            raise
        except (OSError, ValueError, MemoryError, pyarrow.ArrowException) as error:
            raise refused(self.path, f"is damaged ({first_line(error)})") from None
        if table.column_names != list(COLUMNS) or b"set_hash" not in (table.schema.metadata or {}):
            raise refused(self.path, "does not hold what this version writes")
        kinds = pyarrow.types.is_integer, pyarrow.types.is_floating
        for field, expected in zip(table.schema, _schema(), strict=True):
            # Numbers of another size are cast; a truth value, for example, is not.
            if any(of_kind(expected.type) and not of_kind(field.type) for of_kind in kinds):
                raise refused(self.path, f"has no {expected.type} column {field.name}")
        try:
            return table.cast(_schema().with_metadata(table.schema.metadata))
        except (ValueError, pyarrow.ArrowException):
            raise refused(self.path, "does not hold what this version writes") from None

    def _write(self, table: pyarrow.Table) -> None:
        import pyarrow.parquet

        data = io.BytesIO()
        pyarrow.parquet.write_table(table, data, write_page_checksum=True)
        write_atomic(self.path, data.getvalue())


def _schema() -> pyarrow.Schema:
    import pyarrow

    types = (pyarrow.int32(), pyarrow.string(), pyarrow.int16(), pyarrow.int16(), pyarrow.float32(), pyarrow.float32())
    return pyarrow.schema(list(zip(COLUMNS, types, strict=True)))
