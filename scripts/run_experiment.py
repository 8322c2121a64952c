"""Trains the variants of an experiment, each with several seeds, and writes a page that compares them.

    make experiment EXP=configs/experiments/rank.yaml
    python scripts/run_experiment.py --config configs/experiments/rank.yaml --dry-run     # list the runs

Running it again skips finished runs, resumes interrupted ones, and retries failed ones. The runs share their caches. Keys of the
experiment file can be overridden on the command line: `--seeds '[0, 1]'`.
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
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from sushi_research import stopping
from sushi_research.errors import UserError
from sushi_research.experiments.experiment import Planned, describe, plan, state_of
from sushi_research.terminal import say

ROOT = Path(__file__).resolve().parents[1]


def main(experiment: Experiment) -> int:
    """Runs what is not finished, then compares; returns 0, 1 if a run failed, or 128 + the signal that stopped it."""
    with stopping.doing("planning", "no run was started; the same command again begins"):
        planned = plan(experiment)
        states = [(run, state_of(run)) for run in planned]
        say(f"{experiment.title}: {len(planned)} runs in {experiment.folder}", *describe(states).split("\n"))
    if experiment.dry_run:
        return 0
    todo = [(run, state) for run, state in states if state != "done"]
    failed, spent = [], []
    with Interruption() as interruption:
        for number, (run, state) in enumerate(todo, 1):
            left = f", about {minutes(sum(spent) / len(spent) * (len(todo) - number + 1))} left" if spent else ""
            say("", f"--- run {number} of {len(todo)}: {run.name} ({state}){left} ---")
            started = time.monotonic()
            status = interruption.run(launch(experiment, run), {"WANDB_RUN_GROUP": Path(experiment.folder).name})
            if interruption.signal:
                say(f"stopped in {run.name}; the same command again continues from here")
                return 128 + interruption.signal
            if status:
                failed.append(run.name)
                say(f"{run.name} failed (exit status {status}); continuing with the others", file=sys.stderr)
            else:
                spent.append(time.monotonic() - started)
    done = [run for run in planned if run.name not in failed]
    with stopping.doing("comparing", "all runs are kept; the same command again compares them"):
        status = write_comparison(experiment, done) if done else 1
    if failed:
        say(
            f"error: {len(failed)} of {len(planned)} runs failed: {', '.join(failed)}; the reasons are above",
            file=sys.stderr,
        )
    return 1 if failed else status


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
        self._block = stopping.on_signals(self._pass_on)

    def __enter__(self) -> Interruption:
        self._block.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._block.__exit__(None, None, None)

    def run(self, command: Sequence[str], environment: dict[str, str]) -> int:
        """Runs a command and returns its exit status. Raises UserError if it cannot be started."""
        if self.signal:
            return 1
        try:
            # In its own session: otherwise Ctrl-C would kill the launcher, and we could not wait for the script.
            self._process = subprocess.Popen(command, env={**os.environ, **environment}, start_new_session=True)
        except OSError as error:
            raise UserError(
                f"{shlex.quote(command[0])} cannot be started ({error.strerror}): is accelerate installed?"
            ) from None
        if self.signal:  # it came while the process was being created
            self._pass_on(self.signal)
        return self._process.wait()

    def _pass_on(self, number: int) -> None:
        self.signal = self.signal or number
        if self._process is None:
            return
        with contextlib.suppress(psutil.Error):
            # Directly to the children: the launcher of a single process would not forward the signal.
            for script in psutil.Process(self._process.pid).children() or [psutil.Process(self._process.pid)]:
                with contextlib.suppress(psutil.Error):
                    script.send_signal(signal.SIGTERM)


def minutes(seconds: float) -> str:
    """A duration as text, in seconds or minutes."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


if __name__ == "__main__":
    run_main(main, CONFIG)
