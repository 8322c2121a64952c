"""Works through the runs of an experiment: starts them as places become free, and again those that failed.

A failed run is launched again when the others have been started: always if it has come further (to a later checkpoint), else
`retries` times in a row. Not after an error that says what to correct, which the same command would end in again. While no run has
filled the caches, the first one starts alone, so that the others find what it made.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from sushi_research import stopping
from sushi_research.experiments.cells import DONE, FAILED, QUEUED, RUNNING, WAITING, Cell, stamped, table, todo_of
from sushi_research.experiments.experiment import Planned
from sushi_research.experiments.experiment_file import Experiment
from sushi_research.experiments.run_work import LOGS, USER_ERROR, Outcome, claim_of, record_of
from sushi_research.experiments.screen import Screen
from sushi_research.runs.folder_lock import is_locked
from sushi_research.terminal import say

# Seconds between two looks at the runs, and until a run that another command works on is looked at again.
LOOK, BUSY = 0.5, 5.0


class Jobs(Protocol):
    """Where runs are worked on: `LocalJobs` or `ClusterJobs`.

    `is_alone`: one at a time, whose output is on the terminal. `fills_first`: the first run fills the caches before the others
    start. `outlive`: the jobs go on when this command is stopped.
    """

    is_alone: bool
    fills_first: bool
    outlive: bool

    def has_room(self) -> bool: ...
    def start(self, run: Planned, trains: bool) -> str: ...
    def ended(self, seconds: float) -> list[tuple[str, Outcome]]: ...
    def stop(self, number: int) -> None: ...


class Scheduler:
    """The runs of an experiment while they are worked on. `signal` is the one that stopped it, 0 if none did."""

    def __init__(self, experiment: Experiment, cells: Sequence[Cell], jobs: Jobs) -> None:
        self.signal = 0
        self._experiment, self._cells, self._jobs = experiment, cells, jobs
        self._todo = [cell for cell in cells if cell.state != DONE]
        self._numbers = {cell.name: number for number, cell in enumerate(self._todo, 1)}
        self._turns = dict.fromkeys(self._numbers, 0)  # launches by this command
        self._screen = Screen(lambda lines: table(self._cells, lines))
        self._spent: list[float] = []
        self._stopped: list[Cell] = []
        self._busy: set[str] = set()
        self._first: Cell | None = None  # that fills the caches while the others wait
        self._are_filled = jobs.is_alone or not jobs.fills_first or any(_has_begun(cell) for cell in cells)

    def run(self) -> None:
        """Works until nothing is left to do, or until a signal has stopped it."""
        for cell in self._todo:
            cell.state = WAITING
        with stopping.on_signals(self._stop):
            while True:
                if not self.signal:
                    self._start()
                if self.signal and (self._jobs.outlive or not self._is_active()):
                    break
                if not self._is_active() and not self._waiting():
                    break
                if not self._jobs.is_alone:
                    self._look()
                    self._screen.refresh()
                for name, outcome in self._jobs.ended(LOOK):
                    self._settle(self._cell(name), outcome)
        self._screen.clear()

    @property
    def interrupted(self) -> list[str]:
        """The names of the runs that the signal stopped."""
        return [cell.name for cell in self._stopped]

    def _stop(self, number: int) -> None:
        self.signal = self.signal or number
        self._jobs.stop(number)

    def _cell(self, name: str) -> Cell:
        return next(cell for cell in self._todo if cell.name == name)

    def _waiting(self) -> list[Cell]:
        return [cell for cell in self._todo if cell.state == WAITING]

    def _is_active(self) -> bool:
        return any(cell.state in (RUNNING, QUEUED) for cell in self._todo)

    def _start(self) -> None:
        """Starts the runs for which there is room."""
        for cell in sorted(self._waiting(), key=lambda cell: (self._turns[cell.name], self._numbers[cell.name])):
            if self.signal or not self._jobs.has_room() or self._is_filling():
                return
            if cell.not_before > time.monotonic():
                continue
            cell.todo = todo_of(self._experiment, cell.run)  # another command may have done it meanwhile
            if cell.todo == "done":
                cell.state = DONE
                continue
            if self._is_taken(cell):
                self._leave(cell)
                continue
            self._announce(cell)
            if not self._are_filled and self._first is None:
                self._first = cell
            cell.launches += 1
            self._turns[cell.name] += 1
            cell.where, cell.reason = self._jobs.start(cell.run, cell.todo != "to score"), ""
            cell.state = RUNNING
            if self.signal:  # it came while this one was being started
                self._jobs.stop(self.signal)

    def _is_taken(self, cell: Cell) -> bool:
        """Whether another command works on the run, as far as locks can be seen here."""
        claim = claim_of(Path(self._experiment.folder) / LOGS, cell.name)
        return is_locked(claim) or is_locked(cell.run.folder)

    def _leave(self, cell: Cell) -> None:
        """Leaves a run to the command that works on it, to be looked at again."""
        cell.state, cell.where, cell.not_before = WAITING, "another command", time.monotonic() + BUSY
        if cell.name not in self._busy:
            self._busy.add(cell.name)
            self._screen.say(f"another command works on {cell.name}: it is left to it, and looked at again")

    def _look(self) -> None:
        """Notes which jobs of a cluster run and which wait there."""
        for cell in self._todo:
            if self._jobs.fills_first or cell.state not in (RUNNING, QUEUED):
                continue
            record = record_of(Path(self._experiment.folder) / LOGS, cell.name)
            cell.state = RUNNING if record is not None and record.state == RUNNING else QUEUED

    def _is_filling(self) -> bool:
        """Whether the first run is still filling the caches."""
        if self._first is not None and (_has_begun(self._first) or self._first.state != RUNNING):
            # One that ended before its first step has filled nothing: the next one is the first.
            self._first, self._are_filled = None, _has_begun(self._first)
        return self._first is not None

    def _announce(self, cell: Cell) -> None:
        number = f"run {self._numbers[cell.name]} of {len(self._todo)}: {cell.name} ({cell.todo})"
        again = ", again" if self._turns[cell.name] else ""
        if self._jobs.is_alone:
            say("", f"--- {number}{again}{self._left()} ---")
        else:
            self._screen.say(stamped(f"{number}{again} starts{self._left()}"))

    def _left(self) -> str:
        untrained = sum(cell.state in (WAITING, RUNNING) and cell.todo != "to score" for cell in self._todo)
        slots = getattr(self._jobs, "slots", ())  # how many jobs a cluster takes at a time is not known
        if not self._spent or not untrained or not slots:
            return ""
        return f", about {minutes(sum(self._spent) / len(self._spent) * untrained / len(slots))} left"

    def _settle(self, cell: Cell, outcome: Outcome) -> None:
        """Notes how the work on a run has ended, and whether it is to be done again."""
        cell.is_unscored = False
        if self.signal and (outcome.is_busy or outcome.is_stopped):
            cell.state, cell.todo = WAITING, todo_of(self._experiment, cell.run)
            self._stopped += [] if outcome.is_busy else [cell]
        elif outcome.is_busy:
            cell.launches -= 1
            self._turns[cell.name] -= 1
            self._leave(cell)
        elif outcome.status:
            self._settle_failure(cell, outcome)
        else:
            cell.state, cell.reason = DONE, outcome.unscored
            cell.is_unscored = bool(outcome.unscored)
            if outcome.seconds:
                self._spent.append(outcome.seconds)
            if outcome.unscored:
                self._screen.say(f"{outcome.unscored}; {self._then()}", file=sys.stderr)
            elif not self._jobs.is_alone:
                self._screen.say(stamped(f"{cell.name} is done, in {minutes(outcome.seconds)}"))

    def _settle_failure(self, cell: Cell, outcome: Outcome) -> None:
        cell.failures = 0 if outcome.further else cell.failures + 1
        cell.reason = outcome.reason
        is_again = outcome.status != USER_ERROR and cell.failures <= self._experiment.retries and not self.signal
        cell.state = WAITING if is_again else FAILED
        log = "" if self._jobs.is_alone else f"; its output is in {self._experiment.folder}/{LOGS}/{cell.name}.log"
        then = "it is launched again" if is_again else self._then()
        self._screen.say(f"{cell.name} failed ({outcome.reason}){log}; {then}", file=sys.stderr)

    def _then(self) -> str:
        return "the same command again tries it" if self.signal else "continuing with the others"


def _has_begun(cell: Cell) -> bool:
    """Whether a run has come to its first line of metrics, so that its caches are filled."""
    path = cell.run.folder / "metrics.jsonl"
    return path.is_file() and path.stat().st_size > 0


def minutes(seconds: float) -> str:
    """A duration as text, in seconds or minutes."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
