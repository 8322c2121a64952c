"""How a run of an experiment ended: finished, diverged, or stopped on the way."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from sushi_research.errors import UserError
from sushi_research.runs.run_folder import RunFolder

FINISHED, DIVERGED, UNFINISHED, MISSING = "finished", "diverged", "unfinished", "missing"
# The record of a run's last launch among the records that are kept; the experiment has it as logs/RUN.json.
LAUNCH = "launch.json"
LOSS = "evaluation/loss"
# What a training says that stops at a loss or a gradient (training/step_metrics.py).
_NOT_FINITE = re.compile(r"the (?:loss|gradient) at step \d+ is not finite")


def ending(run: Path, launch: Path) -> str:
    """How a run ended. `launch`: the file with the reason why a run has not finished.

    A run diverged if it stopped at a loss or a gradient that is not finite, or if its last validation loss is not.
    """
    record = RunFolder(run, None).record()
    if record is None:
        return MISSING
    if record["finished_at"] is None:
        return DIVERGED if _NOT_FINITE.search(reason(launch)) else UNFINISHED
    losses = [line[LOSS] for line in lines_of(run) if LOSS in line]
    return FINISHED if not losses or is_finite(losses[-1]) else DIVERGED


def reason(launch: Path) -> str:
    """Why the last launch of a run did not finish; "" if that is not known."""
    try:
        return str(json.loads(launch.read_text(encoding="utf-8")).get("reason", ""))
    except (OSError, ValueError, AttributeError):
        return ""


def launch_of(trained: Path, name: str) -> Path:
    """The record of a run's last launch, where the experiment has its runs."""
    return trained / "logs" / f"{name}.json"


def require_ended(run: Path, launch: Path, experiment: str) -> str:
    """How a run ended; UserError if it is missing or has not ended."""
    found, how = ending(run, launch), f"make experiment EXP=configs/experiments/{experiment}.yaml"
    if found == MISSING:
        raise UserError(f"{run} holds no run: {how} first.")
    if found == UNFINISHED:
        raise UserError(f"{run} has not finished, and did not diverge: {how} trains it to its end.")
    return found


def lines_of(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; none if there is no such file."""
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def is_finite(value: float | None) -> bool:
    """Whether a recorded value is a finite number; one that is not finite is recorded as null."""
    return value is not None and math.isfinite(value)
