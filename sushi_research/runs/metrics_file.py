"""metrics.jsonl: the record of a run's metrics, one line per optimizer step and per evaluation."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sushi_research.errors import UserError
from sushi_research.files import append, sync, write_atomic
from sushi_research.runs import metrics_gaps, records
from sushi_research.user_files import UnreadableFile, open_regular, parse_json

logger = logging.getLogger(__name__)

Values = dict[str, float | int | None]
# Far above what a run writes into one line.
MOST_LINE_BYTES = 2**20
_REMEDY = "remove that line or the whole file, then run the same command again, which marks the steps that are missing"


class MetricsFile:
    """metrics.jsonl: one strict JSON object per logged step, `{"step": 120, "loss": 0.1, ...}`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._size: int | None = None  # after this object's last line

    def append(self, values: Values) -> None:
        """Appends one line. None means "no value", for example for a timestep bin without samples.

        If another program has changed or removed the file since the last line, the steps that it lost are marked and a warning is
        logged. Raises ValueError for NaN and infinity (a run stops earlier at such a loss), and UserError if the file cannot be
        written, or is damaged now.
        """
        if self._size is not None and self._size != _size(self.path):
            # An evaluation is logged after the line of its step.
            lost = self.mark_missing(values["step"] - metrics_gaps.is_trained(values))
            logger.warning(
                "%s was changed or removed while this run was writing it%s", self.path, f": {lost}" if lost else ""
            )
        append(self.path, _text([values]))
        self._size = _size(self.path)

    def sync(self) -> None:
        """Syncs all lines to disk. Called before a checkpoint is saved, so that no step up to it is missing."""
        sync(self.path)

    def read(self) -> list[dict[str, Any]]:
        """All lines, by increasing step; the keys of a step are in one line or several. An incomplete last line is skipped.

        UserError, which names the line, for anything else than what a run writes.
        """
        found: list[dict[str, Any]] = []
        seen: set[str] = set()
        for number, line in enumerate(self._complete_lines(), 1):
            where = f"{self.path}, line {number}"
            record = records.fitting(parse_json(line, where, _REMEDY, unique_keys=True), records.LINE, where, _REMEDY)
            last = found[-1]["step"] if found else 0
            if record["step"] != last:
                seen = set()
            if record["step"] < last or not seen.isdisjoint(record.keys() - {"step"}):
                what = f"is about step {record['step']} after step {last}, so it is repeated or out of order"
                raise UserError(f"{where} {what}: {_REMEDY}")
            if record.get(metrics_gaps.MARK, 0) > record["step"]:
                raise UserError(f"{where} marks steps from {record[metrics_gaps.MARK]} to {record['step']}: {_REMEDY}")
            seen |= record.keys() - {"step"}
            found.append(record)
        return found

    def _complete_lines(self) -> Iterator[bytes]:
        """The lines without their ends, one at a time: whatever the file is, only what a run writes is kept in memory."""
        try:
            number = 1
            with open_regular(self.path) as file:
                while (line := file.readline(MOST_LINE_BYTES)).endswith(b"\n"):
                    yield line[:-1]
                    number += 1
            if len(line) == MOST_LINE_BYTES:
                raise UserError(f"{self.path}, line {number} has more than {MOST_LINE_BYTES:,} bytes: {_REMEDY}")
        except UnreadableFile as error:
            if os.path.lexists(self.path):
                raise UserError(f"{self.path} {error.reason}: restore or remove it") from error
        except OSError as error:
            raise UserError(f"{self.path} cannot be read ({error.strerror or error}): restore or remove it") from error

    def cut_back(self, step: int, *, evaluated: Mapping[str, Collection[int]] | None = None) -> None:
        """Drops the lines after `step`, from which the run continues, and an incomplete last line; -1 drops all lines.

        `evaluated`: key prefix -> the only steps at which keys with that prefix are kept. A line without any other key is dropped.
        """

        def without_lost(record: dict[str, Any]) -> dict[str, Any]:
            lost = tuple(prefix for prefix, steps in (evaluated or {}).items() if record["step"] not in steps)
            left = {key: value for key, value in record.items() if not key.startswith(lost)}
            if metrics_gaps.MARK in left and left[metrics_gaps.MARK] <= step:
                left["step"] = min(left["step"], step)  # the part of the gap that is kept
            return left if left.keys() != {"step"} and left["step"] <= step else {}

        self._size = None
        if step < 0 and self.path.exists():
            write_atomic(self.path, b"")
        elif self.path.exists():
            kept = [left for record in self.read() if (left := without_lost(record))]
            write_atomic(self.path, _text(kept))
        self._size = None

    def mark_missing(self, step: int) -> str:
        """Marks the optimizer steps up to `step` whose lines are missing, and drops an incomplete last line.

        Returns a sentence that says which they are; "" if none is missing.
        """
        lines = self.read()
        gaps = metrics_gaps.unmarked(lines, step)
        whole = _text(metrics_gaps.with_marks(lines, gaps))
        if whole != (self.path.read_bytes() if self.path.exists() else b""):
            write_atomic(self.path, whole)
        self._size = _size(self.path)
        if not gaps:
            return ""
        return (
            f"{self.path} has lost the lines of {metrics_gaps.describe(gaps)}: the training is not affected, but its curves "
            "have a gap there, and its training time is not compared"
        )


def _text(lines: Sequence[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines).encode()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1
