"""evaluation.parquet and drift.parquet: the results at each evaluated step, one row per image and noise sample."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from sushi_research.errors import UserError, first_line
from sushi_research.files import require_same_folder, write_atomic

if TYPE_CHECKING:
    import pyarrow

# Increment it when the columns or their meaning change.
FORMAT = 2
# Fewest images for a test between two runs: the coverage of its intervals was measured for this number and above, and with
# fewer images too many bootstrap resamples contain one image only.
MIN_IMAGES = 8
COLUMNS = ("step", "image", "noise_sample", "timestep", "loss", "base_loss")


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

    def read(self) -> pyarrow.Table | None:
        """All rows; None if nothing was evaluated yet. UserError if the file is damaged, which its checksums show too."""
        import pyarrow.parquet

        if not self.path.exists():
            return None
        try:
            # Not read_table: it turns folder names such as "lora.rank=4" into columns.
            with pyarrow.parquet.ParquetFile(self.path, page_checksum_verification=True) as file:
                table = file.read()
        except (OSError, pyarrow.ArrowException) as error:
            raise UserError(
                f"{self.path} is damaged ({first_line(error)}): restore it, or remove it to evaluate again."
            ) from None
        if table.column_names != list(COLUMNS) or b"set_hash" not in (table.schema.metadata or {}):
            raise UserError(f"{self.path} does not hold what this version writes: restore it, or remove it.")
        return table

    def steps(self) -> list[int]:
        """The steps that were evaluated."""
        table = self.read()
        return [] if table is None else sorted(set(table["step"].to_pylist()))

    def loss_at(self, measured: Measured, step: int, column: str = "loss") -> np.ndarray | None:
        """[N, noise samples] of a step; None if it was not evaluated on this set."""
        import pyarrow.compute as compute

        table = self.read()
        if table is None or table.schema.metadata[b"set_hash"] != measured.hash.encode():
            return None
        rows = table.filter(compute.equal(table["step"], step))
        shape = (len(measured.names), measured.noise_samples)
        return rows[column].to_numpy().reshape(shape) if rows.num_rows == shape[0] * shape[1] else None

    def base_loss(self, measured: Measured) -> np.ndarray | None:
        """[N, noise samples]: the base's losses, which every step repeats; None if nothing was evaluated on this set."""
        steps = self.steps()
        return self.loss_at(measured, steps[0], "base_loss") if steps else None

    def append(self, measured: Measured, step: int, loss: np.ndarray, base: np.ndarray) -> None:
        """Adds a step's losses and the base's, [N, noise samples] each. Overwrites earlier results of the step; discards rows of
        a different set."""
        import pyarrow
        import pyarrow.compute as compute

        count = len(measured.names) * measured.noise_samples
        table = pyarrow.table(
            {
                "step": np.full(count, step, np.int32),
                "image": np.repeat(measured.names, measured.noise_samples),
                "noise_sample": np.tile(np.arange(measured.noise_samples, dtype=np.int16), len(measured.names)),
                "timestep": measured.timesteps().astype(np.int16).ravel(),
                "loss": loss.astype(np.float32).ravel(),
                "base_loss": base.astype(np.float32).ravel(),
            }
        ).replace_schema_metadata({"set_hash": measured.hash, "scheme": str(FORMAT)})
        before = self.read()
        if before is not None and before.schema.metadata[b"set_hash"] == measured.hash.encode():
            kept = before.filter(compute.not_equal(before["step"], step))
            table = pyarrow.concat_tables([kept, table]).sort_by([("step", "ascending")])
        self._write(table)

    def cut_back(self, step: int) -> None:
        """Removes results after `step`, from which the run resumes; -1 removes everything."""
        import pyarrow.compute as compute

        if step < 0:
            require_same_folder(self.path)
            self.path.unlink(missing_ok=True)
            return
        table = self.read()
        if table is not None:
            self._write(table.filter(compute.less_equal(table["step"], step)))

    def is_of_another(self, measured: Measured) -> bool:
        """Whether the stored results belong to another set."""
        table = self.read()
        return table is not None and table.schema.metadata[b"set_hash"] != measured.hash.encode()

    def _write(self, table: pyarrow.Table) -> None:
        import pyarrow.parquet

        data = io.BytesIO()
        pyarrow.parquet.write_table(table, data, write_page_checksum=True)
        write_atomic(self.path, data.getvalue())
