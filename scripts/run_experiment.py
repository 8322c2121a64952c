"""Trains the variants of an experiment, each with several seeds, has them scored, and writes a page that compares them.

    make experiment EXP=configs/experiments/rank.yaml
    python scripts/run_experiment.py --config configs/experiments/rank.yaml --dry-run     # list the runs
    python scripts/run_experiment.py --config configs/experiments/rank.yaml --status      # the table, from another terminal

Runs are trained side by side, one on each GPU; --jobs 2 trains two at a time. Running it again skips finished runs, resumes
interrupted ones, and retries failed ones, and the same for their scores. The runs share their caches. Keys of the experiment file
can be overridden on the command line: `--seeds '[0, 1]'`. A sweep file of W&B is an experiment too.
"""

from __future__ import annotations

from sushi_research.config.process import read_command_line, run_main
from sushi_research.experiments.experiment_file import Experiment

INTRO = """\
This trains variants of a run with several seeds and compares them. To begin:
  the runs:         python scripts/run_experiment.py --config configs/experiments/rank.yaml --dry-run
  the experiment:   python scripts/run_experiment.py --config configs/experiments/rank.yaml
  how it stands:    python scripts/run_experiment.py --config configs/experiments/rank.yaml --status
  every option:     python scripts/run_experiment.py --help"""

if __name__ == "__main__":
    CONFIG = read_command_line(Experiment, script="scripts/run_experiment.py", intro=INTRO)

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from sushi_research import stopping
from sushi_research.adapters.tools.outputs import new_file
from sushi_research.experiments import cells, written_sweep
from sushi_research.experiments.cells import DONE, Cell
from sushi_research.experiments.cluster_jobs import ClusterJobs
from sushi_research.experiments.experiment import Planned, describe, plan, scores_state
from sushi_research.experiments.local_jobs import LocalJobs
from sushi_research.experiments.scheduling import Scheduler
from sushi_research.files import write_atomic
from sushi_research.terminal import say

ROOT = Path(__file__).resolve().parents[1]


def main(experiment: Experiment) -> int:
    """Trains and scores what is not done, then compares; returns 0, 1 if any of it failed, or 128 + the signal that stopped it."""
    with stopping.doing("planning", "no run was started; the same command again begins"):
        planned = plan(experiment)  # so a sweep is written only of what can be trained
        if experiment.write_sweep is not None:
            return write_sweep(experiment, new_file(experiment.write_sweep, "", "write_sweep"))
        found = cells.cells_of(experiment, planned)
        if experiment.status:
            say(*cells.table(found))
            return 0
        states = [(cell.run, "done" if cell.todo == "to score" else cell.todo) for cell in found]
        scores = {run.name: scores_state(run, state, experiment.score) for run, state in states}
        say(f"{experiment.title}: {len(planned)} runs in {experiment.folder}", *describe(states, scores).split("\n"))
    if experiment.dry_run:
        return 0
    if any(cell.state != DONE for cell in found) and (signal := work(experiment, found)):
        return 128 + signal
    trained = [cell.run for cell in found if cell.state == DONE]
    with stopping.doing("comparing", "all runs are kept; the same command again compares them"):
        status = write_comparison(experiment, trained) if trained else 1
    failed = [cell.name for cell in found if cell.state != DONE]
    unscored = [cell.name for cell in found if cell.is_unscored]
    for what, names in (("runs failed", failed), ("runs have no scores", unscored)):
        if names:
            reasons = f"{', '.join(names)}; the reasons are above"
            say(f"error: {len(names)} of {len(planned)} {what}: {reasons}", file=sys.stderr)
    return 1 if failed or unscored else status


def work(experiment: Experiment, found: Sequence[Cell]) -> int:
    """Trains and scores what is not done; returns the signal that stopped it, 0 if none did."""
    with ClusterJobs(experiment) if experiment.cluster else LocalJobs(experiment) as jobs:
        scheduler = Scheduler(experiment, found, jobs)
        try:
            scheduler.run()
        finally:  # also where the cluster refuses one of them
            if left := jobs.left():
                say(
                    f"these jobs go on, and the same command again waits for them; to end them: scancel {' '.join(left)}"
                )
    if not jobs.is_alone:
        say("", *cells.table(found))
    if scheduler.signal:
        where = f" in {', '.join(scheduler.interrupted)}" if scheduler.interrupted else ""
        say(f"stopped{where}; the same command again continues from here")
    return scheduler.signal


def write_comparison(experiment: Experiment, runs: Sequence[Planned]) -> int:
    """Writes the comparison page of the runs; returns the exit status of compare_runs.py, 1 without a run of the reference."""
    if experiment.reference not in (None, *(run.variant for run in runs)):
        say(f"no run of the reference, {experiment.reference}, has finished: nothing is compared", file=sys.stderr)
        return 1
    command = [sys.executable, str(ROOT / "scripts/compare_runs.py"), *(str(run.folder) for run in runs)]
    command += ["--output", f"{experiment.folder}/comparison", "--title", experiment.title]
    command += ["--wandb", runs[0].config.tracking.wandb, "--project", runs[0].config.tracking.project]
    if experiment.pool_code:
        command += ["--pool-code"]
    if experiment.grid or experiment.search:
        command += ["--searched"]
    if experiment.reference is not None:
        command += ["--reference", experiment.reference]
    say("", f"--- comparing {len(runs)} runs ---")
    return subprocess.run(command).returncode


def write_sweep(experiment: Experiment, path: Path) -> int:
    """Writes the experiment as a sweep of W&B; returns 0."""
    write_atomic(path, written_sweep.text_of(experiment).encode())
    say(f"{path}: wandb sweep {path} prints the id of a sweep with the same runs")
    return 0


if __name__ == "__main__":
    run_main(main, CONFIG)
