"""Jobs of a cluster: which are waited for and which are submitted, what the table says of them, and Ctrl-C for local ones."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from fake_trainings import experiment_of, wait_for, work_of

from sushi_research.experiments import cells, cluster_jobs, job_signals, slurm_jobs
from sushi_research.experiments.cluster_jobs import ClusterJobs
from sushi_research.experiments.experiment import Planned
from sushi_research.experiments.run_command import IN_JOB
from sushi_research.experiments.run_work import Outcome, record_of, record_path


@pytest.fixture
def logs(tmp_path) -> Path:
    (tmp_path / "runs/logs/jobs").mkdir(parents=True)
    return tmp_path / "runs/logs"


@pytest.fixture
def planned(tmp_path, monkeypatch) -> Planned:
    """A run, whose jobs would do the work of `work_of`."""
    work = work_of(tmp_path)
    monkeypatch.setattr(cluster_jobs, "RunWork", lambda *_, **__: work)
    monkeypatch.setattr(cluster_jobs, "command_of", lambda *_, **__: [])
    config = SimpleNamespace(run=SimpleNamespace(folder=str(tmp_path / "runs")))
    return Planned(Path("s"), "one", "a", 0, [], config)


@pytest.fixture
def slurm(tmp_path, monkeypatch, logs) -> SimpleNamespace:
    """SLURM: `states` by job. Each submitted job has failed at once, and is still called running."""
    found = SimpleNamespace(states={}, submitted=[])

    class Executor:
        def submit(self, work):
            number = str(101 + len(found.submitted))
            found.submitted.append(number)
            found.states[number] = "RUNNING"
            (logs / f"jobs/{number}_submitted.pkl").touch()
            result = logs / f"jobs/{number}_0_result.pkl"
            paths = SimpleNamespace(result_pickle=result)
            return SimpleNamespace(job_id=number, done=lambda: True, result=lambda: Outcome(1, "boom"), paths=paths)

    monkeypatch.setattr(cluster_jobs, "executor_of", lambda *_: Executor())
    monkeypatch.setattr(slurm_jobs, "states_of", lambda jobs: {job: found.states[job] for job in jobs})
    return found


def record(logs: Path, **values) -> None:
    record_path(logs, "one").write_text(json.dumps({"launches": 1, **values}))


def test_a_job_that_has_failed_is_submitted_again_while_slurm_still_calls_it_running(slurm, planned, tmp_path):
    jobs = ClusterJobs(experiment_of(tmp_path, cluster="slurm", slurm={"timeout_min": 5}))
    for number in ("101", "102"):
        assert jobs.start(planned, trains=True) == f"job {number}"
        assert jobs.ended(0.1) == [("one", Outcome(1, "boom"))]
    # The next command neither takes a job that has its result.
    (tmp_path / "runs/logs/jobs/102_0_result.pkl").touch()
    jobs = ClusterJobs(experiment_of(tmp_path, cluster="slurm", slurm={"timeout_min": 5}))
    assert jobs.start(planned, trains=True) == "job 103"


def test_only_a_job_that_the_experiment_has_submitted_is_waited_for(slurm, planned, tmp_path, logs, monkeypatch):
    pytest.importorskip("submitit")
    slurm.states["55"] = "RUNNING"
    record(logs, state="running", job="55")
    experiment = experiment_of(tmp_path, cluster="slurm", slurm={"timeout_min": 5})
    assert ClusterJobs(experiment).start(planned, trains=True) == "job 101"  # 55: a user's own allocation
    (logs / "jobs/55_submitted.pkl").touch()
    record(logs, state="running", job="55")
    assert ClusterJobs(experiment).start(planned, trains=True) == "job 55, of an earlier command"
    # And none is noted that is not the experiment's.
    for job, noted in (("56", None), ("55", "55")):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        work = work_of(tmp_path, "print(1)")
        assert work().status == 0
        found = record_of(logs, "one")
        assert found.job == noted and found.where == socket.gethostname() + (f", job {noted}" if noted else "")


@pytest.mark.parametrize(
    ("state", "where", "known", "shown"),
    [
        ("running", "elsewhere, job 55", {"55": "RUNNING"}, "running  starting  elsewhere, job 55"),
        ("queued", "job 55", {"55": "PENDING"}, "queued   to do  job 55"),
        ("running", "elsewhere, job 55", {"55": "CANCELLED"}, "waiting  to do  job 55 has ended (CANCELLED)"),
        ("queued", "job 55", {"55": "CANCELLED"}, "waiting  to do  job 55 has ended (CANCELLED)"),
        ("running", "elsewhere, job 55", {}, "running  starting  elsewhere, job 55 (by its record, since noon)"),
        ("running", f"{socket.gethostname()}, job 55", {}, "waiting  to do"),  # its lock would be seen
        ("running", "elsewhere, job 56", {"56": "RUNNING"}, "waiting  to do"),  # a user's own allocation
    ],
)
def test_the_table_asks_slurm_for_jobs(planned, tmp_path, logs, monkeypatch, state, where, known, shown):
    monkeypatch.setattr(cells, "todo_of", lambda *_: "to do")
    monkeypatch.setattr(slurm_jobs, "states_of", lambda jobs: {job: known[job] for job in jobs if job in known})
    (logs / "jobs/55_submitted.pkl").touch()
    record(logs, state=state, where=where, job=where[-2:], began="noon")
    lines = cells.table(cells.cells_of(experiment_of(tmp_path), [planned]))
    assert lines[1] == f"  one  {shown}"


def test_states_are_those_of_sacct(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    said = "JobID|State\n7|CANCELLED by 1000\n7.batch|RUNNING\n8|RUNNING\n"
    (tmp_path / "sacct").write_text(f"#!/bin/sh\ncat <<END\n{said}END\n")
    (tmp_path / "sacct").chmod(0o755)
    assert {"7": "CANCELLED", "8": "RUNNING"}.items() <= slurm_jobs.states_of(["7", "8"]).items()
    (tmp_path / "sacct").write_text("#!/bin/sh\nexit 1\n")
    assert slurm_jobs.states_of(["7"]) == slurm_jobs.states_of([]) == {}
    monkeypatch.setenv("PATH", "")
    assert slurm_jobs.states_of(["7"]) == {}


def test_a_signal_that_was_held_back_is_taken_and_only_the_first(monkeypatch):
    monkeypatch.setenv(IN_JOB, "local")
    came = []
    with job_signals.held_back():
        signal.raise_signal(signal.SIGINT)
        assert came == []
        with job_signals.taken(came.append):
            assert came == [signal.SIGINT]
            signal.raise_signal(signal.SIGHUP)
    assert came == [signal.SIGINT]


def test_after_ctrl_c_a_job_of_this_machine_saves_and_is_stopped(planned, tmp_path):
    """The terminal sends SIGINT to all processes, and submitit's own would kill the job after a second."""
    pytest.importorskip("submitit")
    work = cluster_jobs.RunWork()
    begun = time.monotonic()
    with ClusterJobs(experiment_of(tmp_path, cluster="local", slurm={"timeout_min": 2})) as jobs:
        jobs.start(planned, trains=True)
        wait_for(work.folder / "begun")
        job = jobs._running["one"]
        controller = psutil.Process(int(job.job_id))
        for process in (controller, *controller.children()):
            process.send_signal(signal.SIGINT)
        jobs.stop(signal.SIGINT)
        while not (found := jobs.ended(1.0)):
            assert time.monotonic() < begun + 60
    assert job._process.wait(30) == 0, "submitit's process was interrupted, and would kill the job"
    [(_, outcome)] = found
    assert outcome.is_stopped and (outcome.reason, outcome.further) == ("exit status 143: saved", True)
    assert record_of(work.logs, "one").state == "stopped" and not jobs._running
    errors = "".join(path.read_text() for path in (work.logs / "jobs").glob("*.err"))
    assert "Traceback" not in errors
