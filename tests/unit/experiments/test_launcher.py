"""The launcher of an experiment's runs ends as their script did; `accelerate launch` always ends in status 1."""

import os
import sys

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from sushi_research.experiments import launcher
from sushi_research.experiments.experiment_file import ONE_PROCESS
from sushi_research.experiments.run_command import last_line


@pytest.mark.parametrize(
    ("code", "status", "killed"),
    [("", 0, []), ("raise SystemExit(2)", 2, []), ("import os; os.kill(os.getpid(), 9)", 137, [9])],
)
def test_the_status_is_that_of_the_script_and_accelerate_adds_nothing(
    code, status, killed, tmp_path, monkeypatch, capfd
):
    """Through accelerate itself, in this process; 2 says what to correct, and a killed one is no mistake of the user's."""
    (tmp_path / "x.py").write_text(code)
    monkeypatch.setattr(sys, "argv", [])
    ended = []
    monkeypatch.setattr(os, "kill", lambda _, number: ended.append(number))
    assert launcher.main([*ONE_PROCESS, str(tmp_path / "x.py")]) == status
    assert ended == killed and "Traceback" not in capfd.readouterr().err


def test_of_several_processes_the_first_that_failed_counts(monkeypatch, tmp_path):
    """The others are ended for it. torchrun's own lines come after those of the script."""
    failures = {n: ProcessFailure(n, 1, status, "<N/A>") for n, status in enumerate((-15, 2))}
    failures[0].timestamp, failures[1].timestamp = 9, 8

    def launch():
        raise ChildFailedError("train", failures)

    monkeypatch.setattr(sys, "argv", [])
    assert launcher.main([], launch) == 2
    log = tmp_path / "log"
    log.write_text("error: correct lr\nE1127 21:02:29 1 torch/distributed/elastic/api.py:2] failed (exitcode: 2)\n")
    assert last_line(log) == "error: correct lr"
