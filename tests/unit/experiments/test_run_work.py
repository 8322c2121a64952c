"""The work on one run: its processes, log, record and claim; in this process, and as a job of submitit's local executor."""

from __future__ import annotations

import fcntl
import signal
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from sushi_research.errors import UserError
from sushi_research.experiments.cluster_jobs import ClusterJobs, executor_of
from sushi_research.experiments.experiment import Planned
from sushi_research.experiments.experiment_file import Experiment
from sushi_research.experiments.run_work import RunWork, claim_of, log_of, record_of

# Stands for a training: it runs until it is asked to stop, and then saves and ends; launched again, it finishes.
TRAINING = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
def save(*_):
    (folder / "checkpoints/step-00000004").mkdir(parents=True)
    print("saved", flush=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
(folder / "gpus").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
if (folder / "checkpoints").is_dir():
    print("finished")
    sys.exit(0)
(folder / "begun").touch()
time.sleep(60)
"""


def work_of(tmp_path: Path, code: str = TRAINING, **options) -> RunWork:
    folder = tmp_path / "runs/one"
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", code, str(folder)]
    return RunWork("one", folder, tmp_path / "runs/logs", command, None, **options)


def wait_for(path: Path) -> None:
    until = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < until, f"{path} does not come"
        time.sleep(0.02)


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


def experiment_of(tmp_path: Path, **options) -> Experiment:
    return Experiment(
        title="t",
        script="scripts/train_sd15_lora.py",
        configs=["base.yaml"],
        variants={"a": {}},
        folder=str(tmp_path / "runs"),
        **options,
    )


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
