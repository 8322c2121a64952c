"""Runs as jobs of a SLURM cluster, through submitit; or, to try that out, as jobs of this machine by its local executor.

A job trains and scores one run (`RunWork`). When the cluster takes its place (preemption, or the end of its time), the training
saves, and the same job is queued again. Ctrl-C leaves the jobs; the same command again waits for them.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from sushi_research.errors import UserError, first_line
from sushi_research.experiments.cells import QUEUED
from sushi_research.experiments.experiment import Planned
from sushi_research.experiments.experiment_file import Experiment
from sushi_research.experiments.local_jobs import command_of
from sushi_research.experiments.run_work import LOGS, Outcome, RunWork, record_of, record_path
from sushi_research.files import make_folder, write_json

# How often a job may reach the end of its time before it counts as failed. It goes further each time.
MOST_TIMEOUTS = 20
# States of sacct in which a job will still do its work.
_ALIVE = ("PENDING", "RUNNING", "REQUEUED", "SUSPENDED", "COMPLETING", "CONFIGURING", "PREEMPTED", "RESIZING")


class ClusterJobs:
    """The jobs of an experiment. All are submitted at once, or `jobs` at a time."""

    is_alone = False
    fills_first = False  # the first job may wait for hours

    def __init__(self, experiment: Experiment) -> None:
        self._experiment, self._logs = experiment, Path(experiment.folder) / LOGS
        self._executor = executor_of(experiment, self._logs / "jobs")
        self._running: dict[str, Any] = {}
        self.outlive = experiment.cluster == "slurm"

    def __enter__(self) -> ClusterJobs:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def has_room(self) -> bool:
        """Whether another job may be submitted."""
        return self._experiment.jobs is None or len(self._running) < self._experiment.jobs

    def start(self, run: Planned, trains: bool) -> str:
        """Submits the work on a run, or waits for the job of an earlier command that has it; returns which job. UserError if the
        cluster refuses it."""
        if job := self._earlier(run.name):
            self._running[run.name] = job
            return f"job {job.job_id}, of an earlier command"
        work = RunWork(
            run.name,
            run.folder.absolute(),
            self._logs.absolute(),
            command_of(self._experiment, run, is_alone=False) if trains else None,
            self._experiment.score,
            environment={"WANDB_RUN_GROUP": Path(self._experiment.folder).name},
        )
        make_folder(self._logs)
        before = record_of(self._logs, run.name)
        launches = before.launches if before else 0
        try:
            job = self._executor.submit(work)
        except Exception as error:  # of submitit, of sbatch, of the system
            raise UserError(
                f"the job of {run.name} cannot be submitted ({first_line(error)}): correct slurm, or give jobs, so that fewer are "
                "in the queue at a time."
            ) from None
        record = record_of(self._logs, run.name)
        if record is None or record.began is None or record.launches == launches:  # it has not begun yet
            content = {"state": QUEUED, "job": job.job_id, "where": f"job {job.job_id}", "launches": launches}
            write_json(record_path(self._logs, run.name), content)
        self._running[run.name] = job
        return f"job {job.job_id}"

    def ended(self, seconds: float) -> list[tuple[str, Outcome]]:
        """(name, outcome) of the runs whose job has ended, after waiting at most so long for one."""
        until = time.monotonic() + seconds
        while not (names := [name for name, job in self._running.items() if job.done()]) and time.monotonic() < until:
            time.sleep(0.1)
        return [(name, outcome_of(self._running.pop(name))) for name in names]

    def stop(self, number: int) -> None:
        """Leaves the jobs to the cluster; those of this machine are asked to save and stop. Called by signal handlers."""
        for job in self._running.values():
            if not self.outlive:
                job.cancel()

    def left(self) -> list[str]:
        """The numbers of the jobs that are not waited for any more."""
        return [job.job_id for job in self._running.values()] if self.outlive else []

    def _earlier(self, name: str) -> Any:
        """The job of an earlier command for the run, if the cluster still has it."""
        record = record_of(self._logs, name)
        if not self.outlive or record is None or record.job is None:
            return None
        import submitit

        job = submitit.SlurmJob(self._logs / "jobs", record.job)
        state = str(job.get_info(mode="force").get("State", "")).partition(" ")[0].rstrip("+")
        return job if state in _ALIVE else None


def executor_of(experiment: Experiment, folder: Path) -> Any:
    """submitit's executor with the experiment's parameters. UserError without submitit or SLURM, or for an unknown parameter."""
    try:
        import submitit
    except ImportError:
        raise UserError(
            f"cluster is {experiment.cluster}, and submitit is not installed: install the extra (pip install --editable "
            "'.[slurm]')."
        ) from None
    if "timeout_min" not in experiment.slurm:
        raise UserError(
            "slurm has no timeout_min, and submitit's own five minutes are too short: give the minutes that a job may take; it is "
            "queued again if its run has not finished."
        )
    logging.getLogger("submitit").setLevel(logging.WARNING)
    try:
        executor = submitit.AutoExecutor(folder, cluster=experiment.cluster, slurm_max_num_timeout=MOST_TIMEOUTS)
        executor.update_parameters(**{"name": Path(experiment.folder).name, **experiment.slurm})
    except Exception as error:  # of submitit, which raises several kinds
        text = " ".join(str(error).split())[:500]
        raise UserError(f"slurm or this cluster cannot be used by submitit ({text}): correct slurm.") from None
    return executor


def outcome_of(job: Any) -> Outcome:
    """How a job has ended; one that left no result, such as that of a lost node, has failed."""
    try:
        return job.result()
    except Exception as error:  # submitit's own, and what a job raised
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return Outcome(1, f"job {job.job_id}: {lines[-1] if lines else type(error).__name__}")
