"""metrics.jsonl as a comparison needs it: every step once and in order, and how much training time had passed at each."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sushi_research.errors import UserError
from sushi_research.runs import metrics_gaps
from sushi_research.runs.metrics_file import MetricsFile

# Key of a line -> the clock that measured its training time. Older runs recorded the wall clock only (in images_per_second).
CLOCKS = {"gpu_seconds": "GPU time", "cpu_seconds": "CPU time"}
WALL = "wall clock"


@dataclass(frozen=True)
class TrainingTimes:
    """Seconds of training up to each of T steps, without evaluating, sampling and saving: `seconds` by `clock`, and `wall_seconds`.

    None for what is not known. `clock` is a value of CLOCKS, or WALL.
    """

    clock: str | None = None
    seconds: np.ndarray | None = None
    wall_seconds: np.ndarray | None = None


def read_log(path: Path, finished_at: int | None) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl.

    UserError, which names the file: a line that a run does not write, steps that are missing without a mark (metrics_gaps.py),
    repeated or out of order, or a line of another step (`samples_seen` tells).
    `finished_at` is the last step of a finished run, else None.
    """
    if finished_at is not None and not os.path.lexists(path):
        raise UserError(f"{path} is missing: restore the file; it is skipped")
    lines = MetricsFile(path).read()
    expected, per_step = 1, None
    for number, line in enumerate(lines, 1):
        step = line["step"]
        if metrics_gaps.MARK in line:
            if line[metrics_gaps.MARK] != expected or step < expected:
                raise UserError(_out_of_order(path, number, step, expected))
            expected = step + 1
            continue
        if "images_per_second" not in line:
            continue
        if step != expected:
            raise UserError(_out_of_order(path, number, step, expected))
        seen = line.get("samples_seen")
        if seen is not None:
            per_step = seen if step == 1 else per_step
            if per_step is not None and seen != step * per_step:
                raise UserError(
                    f"{path}, line {number} is about step {step}, but its samples_seen is not that of this step: restore the file; "
                    "it is skipped"
                )
        expected += 1
    if finished_at is not None and expected - 1 != finished_at:
        raise UserError(
            f"{path} ends at step {expected - 1}, but the run finished at step {finished_at}: restore the file; it is skipped"
        )
    return lines


def _out_of_order(path: Path, number: int, step: int, expected: int) -> str:
    after = f"after step {expected - 1}" if expected > 1 else "at the beginning"
    return (
        f"{path}, line {number} is about step {step} {after}, so steps are missing, repeated or out of order: restore the file; it "
        "is skipped"
    )


def notes_on_gaps(path: Path, lines: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence for the steps that the file is known to have lost."""
    gaps = metrics_gaps.marked(lines)
    return [f"{path} has lost the lines of {metrics_gaps.describe(gaps)}: the others are used"] if gaps else []


def trained(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines written by optimizer steps; the others are evaluations."""
    return [line for line in lines if "images_per_second" in line]


def training_times(
    path: Path, lines: Sequence[dict[str, Any]], steps: Sequence[int], global_batch_size: int
) -> TrainingTimes:
    """The training times at `steps`, from the lines of `path`.

    UserError if the lines end before the last of the steps or some are missing, or if the clock changes between them.
    """
    if lost := [gap for gap in metrics_gaps.marked(lines) if gap.start <= steps[-1]]:
        raise UserError(f"{path} has no lines of {metrics_gaps.describe(lost)}: its training time is not used")
    of_steps = trained(lines)[: steps[-1]]
    if len(of_steps) < steps[-1]:
        raise UserError(
            f"{path} ends at step {len(of_steps)}, before the last evaluation at step {steps[-1]}: its training time is not used"
        )
    wall = [global_batch_size / line["images_per_second"] for line in of_steps]
    keys = [next((key for key in CLOCKS if key in line), None) for line in of_steps or trained(lines)]
    if len(set(keys)) > 1:
        changed = next(step for step, key in enumerate(keys, 1) if key != keys[0])
        before, after = (CLOCKS.get(keys[step], f"the {WALL} only") for step in (0, changed - 1))
        raise UserError(
            f"{path} records {before} up to step {changed - 1} and {after} from then on: its training time is not used"
        )
    key = keys[0] if keys else None
    spent = wall if key is None else [line[key] for line in of_steps]
    return TrainingTimes(CLOCKS.get(key, WALL), _up_to(spent, steps), _up_to(wall, steps))


def _up_to(seconds: Sequence[float], steps: Sequence[int]) -> np.ndarray:
    return np.concatenate([[0.0], np.cumsum(seconds)])[list(steps)]
