"""The short fault drill: every kind of fault once, on the real scripts; the long one is `make drill N=100`."""

import dataclasses
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from testing import faults
from testing.launches import Setup

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def drill(*words):
    command = [sys.executable, str(ROOT / "testing/fault_injection.py"), *words]
    return subprocess.run(command, capture_output=True, text=True)


def test_every_kind_of_fault_ends_as_if_nothing_had_happened(tmp_path):
    ended = drill(
        "--trials", "10", "--setup", "sd15-1-plain", "--setup", "sdxl-2", "--output", str(tmp_path / "table.md")
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr[-3000:]
    table = (tmp_path / "table.md").read_text()
    rows = [line for line in table.splitlines() if line.startswith("| ") and " of " in line]
    assert len(rows) == 11 and " 0 of 1 " not in table


def test_an_unknown_setup_is_one_sentence():
    ended = drill("--setup", "sd3-1")
    assert ended.returncode == 2 and "error: --setup sd3-1 is unknown: choose from sd15-1, sdxl-1," in ended.stderr
    assert "Traceback" not in ended.stderr


class AnotherSeed(Setup):
    """The setup with another seed: what a trainer that does not continue exactly comes to."""

    @property
    def settings(self):
        return super().settings | {"train.seed": 1}


def test_a_run_that_differs_is_told(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("fault_drill", ROOT / "testing/fault_injection.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def another_run(trial, stage, reference, place, rng):
        trial.setup = AnotherSeed(*dataclasses.astuple(trial.setup))
        faults.finish(trial, stage, reference, place)

    monkeypatch.setitem(faults.FAULTS, "killed", another_run)
    words = ["--trials", "1", "--kind", "killed", "--setup", "sd15-1-plain", "--keep", str(tmp_path / "kept")]
    assert script.main(script.parse(words)) == 1
    told = capsys.readouterr()
    assert "| all | 0 of 1 | 0 of 1 |" in told.out
    assert f"1 of 1 trials differ; all of it is in {tmp_path / 'kept'}" in told.err
    assert "differs: run: the adapter" in told.err and (tmp_path / "kept/trial-000/runs/run").is_dir()
