"""The runs of an experiment as a table: which are done, running, failed and waiting, and how far those that run have come."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from sushi_research.errors import UserError
from sushi_research.experiments import slurm_jobs
from sushi_research.experiments.experiment import Planned, scores_state, state_of
from sushi_research.experiments.experiment_file import Experiment
from sushi_research.experiments.run_command import last_line
from sushi_research.experiments.run_work import LOGS, LaunchRecord, claim_of, record_of
from sushi_research.runs.folder_lock import is_locked
from sushi_research.runs.run_folder import RunFolder

STATES = ("done", "running", "failed", "queued", "waiting")
DONE, RUNNING, FAILED, QUEUED, WAITING = STATES
# Letters of a reason in a table.
_REASON = 100


@dataclass
class Cell:
    """A run in the table. `todo` is what launching it will do: "to do", "to continue", "to score" or "done".

    `failures` counts those since the run last came further. `is_unscored`: it is trained, and could not be scored.
    """

    run: Planned
    state: str
    todo: str
    where: str = ""
    reason: str = ""
    failures: int = 0
    launches: int = 0
    is_unscored: bool = False
    not_before: float = 0.0

    @property
    def name(self) -> str:
        return self.run.name


def cells_of(experiment: Experiment, planned: Sequence[Planned]) -> list[Cell]:
    """The runs as they are now, from what is on the disk; nothing is written. UserError for a folder of another run."""
    logs = Path(experiment.folder) / LOGS
    found = []
    read = {run.name: record_of(logs, run.name) for run in planned}
    jobs = {name: record.job for name, record in read.items() if record is not None and _may_be_in_job(logs, record)}
    states = slurm_jobs.states_of(set(jobs.values()))
    for run in planned:
        todo, record = todo_of(experiment, run), read[run.name]
        cell = Cell(run, DONE if todo == "done" else WAITING, todo)
        is_here = is_locked(run.folder) or is_locked(claim_of(logs, run.name))
        cell.state = RUNNING if is_here else cell.state
        if record is not None and cell.state != DONE:
            cell.reason = record.reason if cell.state != RUNNING else ""
            cell.where, cell.launches = record.where, record.launches
            cell.is_unscored = todo == "to score" and record.state == DONE and bool(record.reason)
            if not is_here and record.state == FAILED:
                cell.state = FAILED
            elif not is_here and run.name in jobs:
                _look_up(cell, record, states.get(record.job))
        found.append(cell)
    return found


def _may_be_in_job(logs: Path, record: LaunchRecord) -> bool:
    return record.state in (RUNNING, QUEUED) and record.job is not None and slurm_jobs.is_submitted(logs, record.job)


def _look_up(cell: Cell, record: LaunchRecord, state: str | None) -> None:
    """How a run stands that is a job by its record, and whose locks are not seen: those of another machine are not seen everywhere.

    `state` is SLURM's, None if it has none.
    """
    is_of_here = record.where.partition(",")[0] == socket.gethostname()
    if state in slurm_jobs.ALIVE:
        cell.state = record.state
    elif state is not None:
        cell.reason = f"job {record.job} has ended ({state})"
    elif record.state == QUEUED or not is_of_here:
        cell.state = record.state
        cell.where += f" (by its record{f', since {record.began}' if record.began else ''})"
    if cell.state == RUNNING:
        cell.reason = ""


def todo_of(experiment: Experiment, run: Planned) -> str:
    """What launching a run will do: "done" (nothing), "to score", "to continue" or "to do"."""
    state = state_of(run)
    return "to score" if state == "done" and scores_state(run, state, experiment.score) == "to score" else state


def counts(cells: Sequence[Cell]) -> str:
    """How many runs are in which state: "6 runs: 2 done, 1 running, 3 waiting"."""
    of_state = {state: sum(cell.state == state for cell in cells) for state in STATES}
    parts = [f"{count} {state}" for state, count in of_state.items() if count]
    return f"{len(cells)} run{'' if len(cells) == 1 else 's'}: {', '.join(parts)}"


def table(cells: Sequence[Cell], most: int | None = None) -> list[str]:
    """The lines of the table: the counts, then the runs by state. With more than `most` lines, those left out are counted."""
    order = (RUNNING, FAILED, QUEUED, WAITING, DONE)
    ordered = sorted(cells, key=lambda cell: order.index(cell.state))
    width = max((len(cell.name) for cell in cells), default=0)
    shown = ordered if most is None or len(ordered) + 1 <= most else ordered[: max(most - 2, 0)]
    lines = [f"  {cell.name:<{width}}  {cell.state:<7}  {'  '.join(_details(cell))}".rstrip() for cell in shown]
    left = len(ordered) - len(shown)
    return [counts(cells), *lines, *([f"  and {left} more"] if left else [])]


def _details(cell: Cell) -> Iterator[str]:
    if cell.state == RUNNING:
        yield from filter(None, [progress_of(cell.run.folder), cell.where])
    elif cell.state == DONE:
        return
    else:
        yield cell.todo
        if cell.where and cell.state == QUEUED:
            yield cell.where
    if cell.launches > 1 and cell.state != DONE:
        yield f"launch {cell.launches}"
    if cell.reason:
        yield cell.reason if len(cell.reason) <= _REASON else f"{cell.reason[: _REASON - 3]}..."


def progress_of(folder: Path) -> str:
    """How far a run has come, by its files: "step 120 of 240"; "starting" before its first step."""
    try:
        record = RunFolder(folder, None).record()
        step = json.loads(last_line(folder / "metrics.jsonl"))["step"]
    except (UserError, ValueError, KeyError, TypeError):
        return "starting"
    if record is None:
        return "starting"
    return f"step {step} of {record['steps']}" if record["finished_at"] is None else "scoring"


def stamped(text: str) -> str:
    """A line for a log, with the time."""
    return f"{datetime.now():%Y-%m-%d %H:%M:%S} {text}"
