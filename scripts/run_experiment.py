"""Trains the variants of an experiment, each with several seeds, has them scored, and writes a page that compares them.

    make experiment EXP=configs/experiments/rank.yaml
    python scripts/run_experiment.py --config configs/experiments/rank.yaml --dry-run     # list the runs

Running it again skips finished runs, resumes interrupted ones, and retries failed ones, and the same for their scores. The runs
share their caches. Keys of the experiment file can be overridden on the command line: `--seeds '[0, 1]'`.
"""

from __future__ import annotations

from sushi_research.config.process import read_command_line, run_main
from sushi_research.experiments.experiment import Experiment

INTRO = """\
This trains variants of a run with several seeds and compares them. To begin:
  the runs:         python scripts/run_experiment.py --config configs/experiments/rank.yaml --dry-run
  the experiment:   python scripts/run_experiment.py --config configs/experiments/rank.yaml
  with make:        make experiment EXP=configs/experiments/rank.yaml
  every option:     python scripts/run_experiment.py --help"""

if __name__ == "__main__":
    CONFIG = read_command_line(Experiment, script="scripts/run_experiment.py", intro=INTRO)

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import psutil

from sushi_research import stopping
from sushi_research.errors import UserError
from sushi_research.experiments import scoring
from sushi_research.experiments.experiment import Planned, describe, plan, scores_state, state_of
from sushi_research.runs.run_folder import RunFolder
from sushi_research.terminal import say

ROOT = Path(__file__).resolve().parents[1]


def main(experiment: Experiment) -> int:
    """Trains and scores what is not done, then compares; returns 0, 1 if any of it failed, or 128 + the signal that stopped it."""
    with stopping.doing("planning", "no run was started; the same command again begins"):
        planned = plan(experiment)
        states = [(run, state_of(run)) for run in planned]
        scores = {run.name: scores_state(run, state, experiment.score) for run, state in states}
        say(f"{experiment.title}: {len(planned)} runs in {experiment.folder}", *describe(states, scores).split("\n"))
    if experiment.dry_run:
        return 0
    todo = [(run, state) for run, state in states if state != "done" or scores[run.name] == "to score"]
    untrained = sum(state != "done" for _, state in todo)
    failed, unscored, spent = [], [], []
    with Interruption() as interruption:
        for number, (run, state) in enumerate(todo, 1):
            left = f", about {minutes(sum(spent) / len(spent) * untrained)} left" if spent and untrained else ""
            doing = scores[run.name] if state == "done" else state
            say("", f"--- run {number} of {len(todo)}: {run.name} ({doing}){left} ---")
            started, status = time.monotonic(), 0
            if state != "done":
                untrained -= 1
                status = interruption.run(launch(experiment, run), {"WANDB_RUN_GROUP": Path(experiment.folder).name})
                if status and not interruption.signal:
                    failed.append(run.name)
                    say(f"{run.name} failed (exit status {status}); continuing with the others", file=sys.stderr)
            if not status and not interruption.signal and not has_scores(experiment, run, interruption):
                unscored.append(run.name)
            if interruption.signal:
                say(f"stopped in {run.name}; the same command again continues from here")
                return 128 + interruption.signal
            if state != "done" and not status:
                spent.append(time.monotonic() - started)
    done = [run for run in planned if run.name not in failed]
    with stopping.doing("comparing", "all runs are kept; the same command again compares them"):
        status = write_comparison(experiment, done) if done else 1
    for what, names in (("runs failed", failed), ("runs have no scores", unscored)):
        if names:
            reasons = f"{', '.join(names)}; the reasons are above"
            say(f"error: {len(names)} of {len(planned)} {what}: {reasons}", file=sys.stderr)
    return 1 if failed or unscored else status


def has_scores(experiment: Experiment, run: Planned, interruption: Interruption) -> bool:
    """Has a finished run scored if that is asked for and not done yet; prints why not if it fails."""
    folder = RunFolder(run.folder, None)
    if experiment.score is None or scoring.is_scored(folder, experiment.score):
        return True
    say(f"scoring {run.name}")
    try:
        scoring.score(folder, experiment.score, interruption.run_and_listen)
    except UserError as error:
        if not interruption.signal:
            say(f"{error}; continuing with the others", file=sys.stderr)
        return False
    return True


def launch(experiment: Experiment, run: Planned) -> list[str]:
    """The command of a run, as a user would type it."""
    # From the folder of this Python, so that the virtual environment need not be activated.
    accelerate = Path(sys.executable).with_name("accelerate")
    program = [str(accelerate)] if accelerate.exists() else ["accelerate"]
    return [*program, "launch", *experiment.launch, str(run.script), *run.arguments]


def write_comparison(experiment: Experiment, runs: Sequence[Planned]) -> int:
    """Writes the comparison page of the runs; returns the exit status of compare_runs.py."""
    command = [sys.executable, str(ROOT / "scripts/compare_runs.py"), *(str(run.folder) for run in runs)]
    command += ["--output", f"{experiment.folder}/comparison", "--title", experiment.title]
    command += ["--wandb", runs[0].config.tracking.wandb, "--project", runs[0].config.tracking.project]
    if experiment.pool_code:
        command += ["--pool-code"]
    if experiment.reference is not None:
        command += ["--reference", experiment.reference]
    say("", f"--- comparing {len(runs)} runs ---")
    return subprocess.run(command).returncode


class Interruption:
    """A context manager that forwards signals to the running script as SIGTERM, at which it saves and stops.

    `signal` is the first signal received, 0 if there was none.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._has_launcher = True
        self._block = stopping.on_signals(self._pass_on)

    def __enter__(self) -> Interruption:
        self._block.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._block.__exit__(None, None, None)

    def run(self, command: Sequence[str], environment: dict[str, str]) -> int:
        """Runs a training and returns its exit status. Raises UserError if it cannot be started."""
        if self.signal:
            return 1
        return self._start(command, "is accelerate installed?", env={**os.environ, **environment}).wait()

    def run_and_listen(self, command: Sequence[str]) -> tuple[int, str]:
        """Runs any command; returns its exit status and the last line of its output. Raises UserError if it cannot be started."""
        if self.signal:
            return 1, ""
        process = self._start(
            command, "check its path", has_launcher=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        heard: list[bytes] = []
        # In a thread that is not waited for long: what the command leaves running in the background may keep the pipe open.
        listener = threading.Thread(target=show, args=(process.stdout, heard), name="output", daemon=True)
        listener.start()
        status = process.wait()
        listener.join(5.0)
        lines = b"".join(heard).decode(errors="replace").replace("\r", "\n").split("\n")
        return status, next((line.strip() for line in reversed(lines) if line.strip()), "")

    def _start(
        self, command: Sequence[str], advice: str, has_launcher: bool = True, **options: Any
    ) -> subprocess.Popen[bytes]:
        self._has_launcher = has_launcher
        try:
            # In its own session: otherwise Ctrl-C would kill the launcher, and we could not wait for the script.
            self._process = subprocess.Popen(command, start_new_session=True, **options)
        except (OSError, ValueError) as error:  # ValueError: what no argument can hold, such as a zero byte
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{shlex.quote(command[0])} cannot be started ({reason}): {advice}") from None
        if self.signal:  # it came while the process was being created
            self._pass_on(self.signal)
        return self._process

    def _pass_on(self, number: int) -> None:
        self.signal = self.signal or number
        if self._process is None:
            return
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(self._process.pid)
            children = process.children(recursive=not self._has_launcher)
            # A launcher of a single process would not forward the signal; any other command ends with all that it started.
            for each in children if self._has_launcher and children else [*children, process]:
                with contextlib.suppress(psutil.Error):
                    each.send_signal(signal.SIGTERM)


def show(output: IO[bytes], heard: list[bytes]) -> None:
    """Prints what a command writes, as it comes; `heard` gets the last 4 KiB of it."""
    while chunk := os.read(output.fileno(), 65536):
        sys.stdout.buffer.write(chunk)
        sys.stdout.flush()
        heard[:] = [b"".join([*heard, chunk])[-4096:]]


def minutes(seconds: float) -> str:
    """A duration as text, in seconds or minutes."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


if __name__ == "__main__":
    run_main(main, CONFIG)
