"""The work on one run: its processes, log, record and claim; in this process, and as a job of submitit's local executor."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
from fake_trainings import TRAINING, experiment_of, wait_for, work_of

from sushi_research.errors import UserError
from sushi_research.experiments.cluster_jobs import ClusterJobs, executor_of
from sushi_research.experiments.experiment import Planned
from sushi_research.experiments.run_work import claim_of, log_of, record_of
from sushi_research.runs.folder_lock import is_locked


def test_a_training_is_stopped_and_goes_on(tmp_path):
    work = work_of(tmp_path, environment={"CUDA_VISIBLE_DEVICES": "3"}, where="GPU 3")
    found = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    wait_for(work.folder / "begun")
    assert (work.folder / "gpus").read_text() == "3"
    assert record_of(work.logs, "one").state == "running" and record_of(work.logs, "one").where == "GPU 3"
    assert work_of(tmp_path)().is_busy  # for another command
    work.stop(signal.SIGINT)
    thread.join()
    assert (found[0].status, found[0].further, found[0].reason) == (143, True, "exit status 143: saved")
    assert record_of(work.logs, "one").state == "stopped"
    again = work_of(tmp_path)()
    assert (again.status, again.reason) == (0, "") and again.seconds > 0
    assert log_of(work.logs, "one").read_text() == "saved\nfinished\n"
    assert (record_of(work.logs, "one").state, record_of(work.logs, "one").launches) == ("done", 2)


@pytest.mark.parametrize(
    ("status", "score", "stopped", "state"),
    [
        (143, None, True, "stopped"),
        (0, None, False, "done"),
        (0, "judge {run}", True, "stopped"),
        (1, None, False, "failed"),
    ],
)
def test_what_ended_by_itself_while_it_was_asked_to_stop_is_not_stopped(tmp_path, status, score, stopped, state):
    work = work_of(tmp_path, TRAINING.replace("sys.exit(143)", f"sys.exit({status})"))
    work.score, found = score, []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    wait_for(work.folder / "begun")
    work.stop(signal.SIGINT)
    thread.join()
    record = record_of(work.logs, "one")
    assert (found[0].status, found[0].is_stopped, record.state) == (status, stopped, state)
    assert record.reason == ("exit status 1: saved" if status == 1 else "")


def test_work_that_was_stopped_before_it_began_is_stopped(tmp_path):
    work = work_of(tmp_path)
    work.stop(signal.SIGTERM)
    outcome = work()
    assert outcome.is_stopped and outcome.status and record_of(work.logs, "one").state == "stopped"
    assert not (work.folder / "begun").exists()


def test_what_a_killed_experiment_leaves_running_keeps_the_claim(tmp_path):
    """A second command would start the same beside it."""
    work = work_of(tmp_path)
    if not (experiment := os.fork()):
        with contextlib.suppress(BaseException):
            work()
        os._exit(0)
    wait_for(work.folder / "begun")
    [training] = psutil.Process(experiment).children()
    os.kill(experiment, signal.SIGKILL)
    os.waitpid(experiment, 0)
    try:
        assert is_locked(claim_of(work.logs, "one")) and work_of(tmp_path)().is_busy
    finally:
        training.kill()
    until = time.monotonic() + 30
    while is_locked(claim_of(work.logs, "one")):
        assert time.monotonic() < until
        time.sleep(0.01)


def test_what_a_command_leaves_running_does_not_keep_the_claim(tmp_path):
    work = work_of(tmp_path)
    work.command = ["sh", "-c", f"sleep 60 & echo $! > {work.folder}/left"]
    assert work().status == 0
    left = int((work.folder / "left").read_text())
    try:
        assert psutil.pid_exists(left) and not is_locked(claim_of(work.logs, "one"))
    finally:
        os.kill(left, signal.SIGKILL)


def test_a_failure_has_its_reason(tmp_path):
    outcome = work_of(tmp_path, "raise SystemExit('error: no space is left\\n')")()
    assert (outcome.status, outcome.reason, outcome.further) == (1, "exit status 1: error: no space is left", False)
    assert record_of(tmp_path / "runs/logs", "one").reason == outcome.reason
    killed = work_of(tmp_path, "import os; os.kill(os.getpid(), 9)")()
    assert (killed.status, killed.reason) == (-9, "signal 9")
    work = work_of(tmp_path)
    work.command = ["no-such-program"]
    assert work().reason == "no-such-program cannot be started (No such file or directory): is accelerate installed?"


def test_a_run_that_another_process_holds_is_left_to_it(tmp_path):
    work = work_of(tmp_path, "print(1)")
    work.logs.mkdir()
    with open(claim_of(work.logs, "one"), "ab") as claim:
        fcntl.flock(claim, fcntl.LOCK_EX)
        assert work().is_busy and record_of(work.logs, "one") is None
    assert work().status == 0


def test_a_training_that_finds_its_folder_in_use_is_left_to_the_other_one(tmp_path):
    """Of a command that was killed while its training was still starting: no lock is seen before, and the training refuses."""
    code = """import fcntl, os, time
fcntl.flock(os.open({!r}, os.O_RDONLY), fcntl.LOCK_EX)
if os.fork() == 0:
    time.sleep(1)  # the other one, which has the lock too
os._exit(2)"""
    outcome = work_of(tmp_path, code.format(str(tmp_path / "runs/one")))()
    assert (outcome.is_busy, outcome.status) == (True, 0)
    assert record_of(tmp_path / "runs/logs", "one").state == "stopped"


def test_a_job_that_loses_its_place_saves_and_is_queued_again(tmp_path, monkeypatch):
    """With submitit's local executor: SIGUSR2 is what SLURM sends at preemption and before the end of a job's time."""
    jobs = ClusterJobs(experiment_of(tmp_path, cluster="local", slurm={"timeout_min": 2, "slurm_partition": "gpu"}))
    work = work_of(tmp_path)
    monkeypatch.setattr("sushi_research.experiments.cluster_jobs.RunWork", lambda *_, **__: work)
    monkeypatch.setattr("sushi_research.experiments.cluster_jobs.command_of", lambda *_, **__: [])

    class Config:
        class run:
            folder = str(tmp_path / "runs")

    assert jobs.start(Planned(Path("s"), "one", "a", 0, [], Config), trains=True).startswith("job ")
    wait_for(work.folder / "begun")
    assert jobs.ended(0.1) == []
    [task] = psutil.Process(int(jobs._running["one"].job_id)).children()
    task.send_signal(signal.SIGUSR2)
    until = time.monotonic() + 60
    while not (found := jobs.ended(1.0)):
        assert time.monotonic() < until
    [(name, outcome)] = found
    assert (name, outcome.status, outcome.reason) == ("one", 0, "")
    assert log_of(work.logs, "one").read_text() == "saved\nfinished\n"
    assert (record_of(work.logs, "one").state, record_of(work.logs, "one").launches) == ("done", 2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cluster": "local"}, "slurm has no timeout_min"),
        ({"cluster": "local", "slurm": {"timeout_min": 9, "slurm_partitionn": "x"}}, "Unknown argument 'partitionn'"),
        ({"cluster": "slurm", "slurm": {"timeout_min": 9}}, "slurm or this cluster cannot be used by submitit"),
    ],
)
def test_a_mistake_in_the_parameters_of_jobs_is_one_sentence(tmp_path, monkeypatch, options, words):
    monkeypatch.setenv("PATH", "")  # no srun
    with pytest.raises(UserError, match=words) as caught:
        executor_of(experiment_of(tmp_path, **options), tmp_path)
    assert "\n" not in str(caught.value)
