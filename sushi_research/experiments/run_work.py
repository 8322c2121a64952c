"""The work on one run of an experiment: it is trained, then scored. A thread of this process or a job of a cluster calls it.

In `logs` of the experiment's folder each run has its output (NAME.log), unless that is on the terminal, and a record of its last
launch (NAME.json). Whoever works on a run has its claim locked (NAME.lock), so that several commands can share an experiment. The
processes of the work hold the claim too: one that outlives a killed experiment is not started a second time beside itself.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sushi_research.errors import UserError
from sushi_research.experiments import job_signals, scoring, slurm_jobs
from sushi_research.experiments.run_command import RunCommand
from sushi_research.files import make_folder, write_json, writing
from sushi_research.runs import records
from sushi_research.runs.folder_lock import is_locked, try_lock, unlock
from sushi_research.runs.run_folder import RunFolder
from sushi_research.terminal import say

if TYPE_CHECKING:
    from submitit.core.utils import DelayedSubmission

LOGS = "logs"
# Exit status of a script after an error that says what to correct: the same command would end in it again.
USER_ERROR = 2


class LaunchRecord(records.Record):
    """NAME.json: the last launch of a run by an experiment."""

    state: str
    where: str = ""
    job: str | None = None
    launches: int = 0
    began: str | None = None
    ended: str | None = None
    reason: str = ""


@dataclass(frozen=True)
class Outcome:
    """How the work on a run ended. `status`: the exit status of its training, 0 if it has finished; `reason`: why not.

    `further`: whether a failed training has come further than before. `unscored`: why a finished run has no scores. `seconds` of
    training. `is_busy`: another command works on the run, so nothing was done. `is_stopped`: it was asked to stop, and has; neither
    what had finished by then nor what failed for another reason was stopped.
    """

    status: int = 0
    reason: str = ""
    further: bool = False
    unscored: str = ""
    seconds: float = 0.0
    is_busy: bool = False
    is_stopped: bool = False


@dataclass
class RunWork:
    """What is to be done for a run: `command` trains it (None if that is done), `score` is the command that scores it.

    `logs` is the folder of its log and its record; with `on_terminal` its output goes to the terminal.
    """

    name: str
    folder: Path
    logs: Path
    command: Sequence[str] | None
    score: str | None
    environment: Mapping[str, str] = field(default_factory=dict)
    on_terminal: bool = False
    where: str = ""

    def __post_init__(self) -> None:
        self._processes = RunCommand(None if self.on_terminal else log_of(self.logs, self.name))
        before = record_of(self.logs, self.name)
        self._launches, self._began = 1 + (before.launches if before else 0), now()

    def __getstate__(self) -> dict[str, Any]:
        return {each.name: getattr(self, each.name) for each in fields(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def __call__(self) -> Outcome:
        """Trains and scores the run, unless another command does. Raises no UserError: it is the outcome's reason."""
        try:
            make_folder(self.logs)
            with job_signals.taken(self.stop), claimed(claim_of(self.logs, self.name)) as claim:
                if claim is None or is_locked(self.folder):
                    return Outcome(is_busy=True)
                self._processes.inherited = (claim,)
                return self._done()
        except UserError as error:
            return Outcome(USER_ERROR, str(error))

    def stop(self, number: int) -> None:
        """Asks what is running to stop; nothing more is started."""
        self._processes.stop(number)

    def checkpoint(self) -> DelayedSubmission:
        """submitit calls it, in the thread of the work, when the cluster takes the job's node: the training saves and ends, and the
        same work is queued again."""
        from submitit.helpers import DelayedSubmission

        self.stop(signal.SIGTERM)
        self._processes.wait()
        self._note("queued", reason="the cluster took its place; it goes on when it has one")
        return DelayedSubmission(replace(self))

    def _done(self) -> Outcome:
        self._note("running")
        try:
            outcome = self._trained()
            if not outcome.status and not outcome.is_busy:
                outcome = self._scored(outcome)
        except UserError as error:
            outcome = Outcome(USER_ERROR, str(error))
        if outcome.is_stopped or outcome.is_busy:
            self._note("stopped", ended=now())
        elif outcome.status:
            self._note("failed", ended=now(), reason=outcome.reason)
        else:
            self._note("done", ended=now(), reason=outcome.unscored)
        return outcome

    def _trained(self) -> Outcome:
        if self.command is None:
            return Outcome()
        reached, started = last_checkpoint(self.folder), time.monotonic()
        status, said = self._processes.train(self.command, self.environment)
        if not status:
            return Outcome(seconds=time.monotonic() - started)
        if status == USER_ERROR and is_locked(
            self.folder
        ):  # that of a command that was killed, which was still starting
            return Outcome(is_busy=True)
        how = f"exit status {status}" if status > 0 else f"signal {-status}"
        reason = f"{how}: {said}" if said else how
        further = last_checkpoint(self.folder) > reached
        return Outcome(status, reason, further, is_stopped=self._is_stopped(status))

    def _is_stopped(self, status: int) -> bool:
        """Whether a command with this exit status has ended because of `stop`: by a signal, or after one (128 + its number)."""
        return bool(self._processes.signal) and (status < 0 or 128 < status < 128 + signal.NSIG)

    def _scored(self, outcome: Outcome) -> Outcome:
        """Has the run scored if that is asked for and not done yet; returns the outcome with why it has no scores."""
        folder = RunFolder(self.folder, None)
        if self.score is None or scoring.is_scored(folder, self.score):
            return outcome
        if self._processes.signal:
            return replace(outcome, unscored=f"{self.name} has no scores: it was stopped before", is_stopped=True)
        statuses = []

        def judged(words: Sequence[str]) -> tuple[int, str]:
            status, said = self._processes.judge(words, self.environment)
            statuses.append(status)
            return status, said

        if self.on_terminal:
            say(f"scoring {self.name}")
        try:
            scoring.score(folder, self.score, judged)
        except UserError as error:
            return replace(outcome, unscored=str(error), is_stopped=any(map(self._is_stopped, statuses)))
        return outcome

    def _note(self, state: str, **values: Any) -> None:
        known = {
            "launches": self._launches,
            "began": self._began,
            "job": job_of(self.logs),
            "where": self.where or place(self.logs),
        }
        write_json(record_path(self.logs, self.name), {"state": state, **known, **values})


def record_path(logs: Path, name: str) -> Path:
    """The file of a run's `LaunchRecord`."""
    return logs / f"{name}.json"


def log_of(logs: Path, name: str) -> Path:
    """The file that gets a run's output."""
    return logs / f"{name}.log"


def claim_of(logs: Path, name: str) -> Path:
    """The file that is locked by whoever works on a run."""
    return logs / f"{name}.lock"


def record_of(logs: Path, name: str) -> LaunchRecord | None:
    """The record of a run's last launch; None if there is none, or if it is damaged: only tables have it."""
    try:
        return LaunchRecord(**records.read_as(record_path(logs, name), LaunchRecord, ""))
    except UserError:
        return None


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[int | None]:
    """The descriptor of the file, which is locked for the block; None if another process has it locked.

    Where files cannot be locked it is not: the run's own lock is left.
    """
    with writing("write", path):
        file = open(path, "ab")  # noqa: SIM115
    with file:
        is_taken = os.name != "nt" and try_lock(file.fileno()) is False
        try:
            yield None if is_taken else file.fileno()
        finally:
            unlock(file.fileno())  # closing it would not, if a command has left something running


def last_checkpoint(folder: Path) -> int:
    """The step of the last checkpoint of a run; -1 without one."""
    names = os.listdir(folder / "checkpoints") if (folder / "checkpoints").is_dir() else []
    return max((int(match[1]) for name in names if (match := re.fullmatch(r"step-(\d{1,18})", name))), default=-1)


def job_of(logs: Path) -> str | None:
    """The number of the experiment's SLURM job that this process is; None in an allocation of the user's own."""
    job = os.environ.get("SLURM_JOB_ID")
    return job if job and slurm_jobs.is_submitted(logs, job) else None


def place(logs: Path) -> str:
    """This machine, and the experiment's SLURM job that this process is."""
    job = job_of(logs)
    return f"{socket.gethostname()}{f', job {job}' if job else ''}"


def now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
