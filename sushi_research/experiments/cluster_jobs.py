"""Runs as jobs of a SLURM cluster, through submitit; or, to try that out, as jobs of this machine by its local executor.

A job trains and scores one run (`RunWork`). When the cluster takes its place (preemption, or the end of its time), the training
saves, and the same job is queued again. Ctrl-C leaves the jobs of a cluster, and the same command again waits for them; jobs of
this machine save and end.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import time
from pathlib import Path
from typing import Any

import psutil

from sushi_research.errors import UserError, first_line
from sushi_research.experiments import job_signals, slurm_jobs
from sushi_research.experiments.cells import QUEUED
from sushi_research.experiments.experiment import Planned
from sushi_research.experiments.experiment_file import Experiment
from sushi_research.experiments.local_jobs import command_of
from sushi_research.experiments.run_work import LOGS, Outcome, RunWork, record_of, record_path
from sushi_research.files import make_folder, write_json

# How often a job may reach the end of its time before it counts as failed. It goes further each time.
MOST_TIMEOUTS = 20
# In the command line of the process of a job of this machine.
_TASK = "submitit.core._submit"


class ClusterJobs:
    """The jobs of an experiment. All are submitted at once, or `jobs` at a time."""

    is_alone = False
    fills_first = False  # the first job may wait for hours

    def __init__(self, experiment: Experiment) -> None:
        self._experiment, self._logs = experiment, Path(experiment.folder) / LOGS
        self._executor = executor_of(experiment, self._logs / slurm_jobs.JOBS)
        self._running: dict[str, Any] = {}
        self._settled: set[str] = set()  # the jobs whose outcome was taken
        self._signal = 0
        self._asked: set[int] = set()  # the processes that were asked to stop
        self.outlive = experiment.cluster == "slurm"

    def __enter__(self) -> ClusterJobs:
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is not None:  # nobody is left to look after those of this machine
            self.stop(signal.SIGTERM)
        while self._running and not self.outlive:
            self.ended(1.0)

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
            with job_signals.held_back():
                job = self._executor.submit(work)
        except Exception as error:  # of submitit, of sbatch, of the system
            raise UserError(
                f"the job of {run.name} cannot be submitted ({first_line(error)}): correct slurm, or give jobs, so that fewer are "
                "in the queue at a time."
            ) from None
        record = record_of(self._logs, run.name)
        if record is None or record.began is None or record.launches == launches:  # it has not begun yet
            content = {"state": QUEUED, "where": f"job {job.job_id}", "launches": launches}
            content["job"] = job.job_id if self.outlive else None  # the number of a process is none of SLURM's
            write_json(record_path(self._logs, run.name), content)
        self._running[run.name] = job
        return f"job {job.job_id}"

    def ended(self, seconds: float) -> list[tuple[str, Outcome]]:
        """(name, outcome) of the runs whose job has ended, after waiting at most so long for one."""
        until = time.monotonic() + seconds
        while not (names := [name for name, job in self._running.items() if job.done()]) and time.monotonic() < until:
            self._ask()
            time.sleep(0.1)
        return [(name, self._outcome(self._running.pop(name))) for name in names]

    def stop(self, number: int) -> None:
        """Leaves the jobs to the cluster; those of this machine are asked to save and stop. Called by signal handlers."""
        self._signal = self._signal or number
        self._ask()

    def left(self) -> list[str]:
        """The numbers of the jobs that are not waited for any more."""
        return [job.job_id for job in self._running.values()] if self.outlive else []

    def _ask(self) -> None:
        """Once stopped, asks the jobs of this machine to save and stop, each once, and one that is being started when it is there.

        submitit's own process is not asked: it would kill the job after a second.
        """
        for job in list(self._running.values()) if self._signal and not self.outlive else []:
            with contextlib.suppress(psutil.Error):
                for process in psutil.Process(int(job.job_id)).children(recursive=True):
                    with contextlib.suppress(psutil.Error):
                        if process.pid not in self._asked and _TASK in process.cmdline():
                            self._asked.add(process.pid)
                            process.send_signal(signal.SIGINT)

    def _outcome(self, job: Any) -> Outcome:
        self._settled.add(job.job_id)
        if self._signal and not self.outlive and not job.paths.result_pickle.exists():  # it was still starting
            return Outcome(-self._signal, f"signal {self._signal}", is_stopped=True)
        return outcome_of(job)

    def _earlier(self, name: str) -> Any:
        """The job of an earlier command for the run, if the cluster still has it and it has no result yet.

        SLURM calls a job running for a while after its work has ended.
        """
        record = record_of(self._logs, name)
        if not self.outlive or record is None or record.job is None or record.job in self._settled:
            return None
        import submitit

        job = submitit.SlurmJob(self._logs / slurm_jobs.JOBS, record.job)
        if not slurm_jobs.is_submitted(self._logs, record.job) or job.paths.result_pickle.exists():
            return None
        return job if slurm_jobs.states_of([record.job]).get(record.job) in slurm_jobs.ALIVE else None


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
