"""The short fault drill: every kind of fault once, on the real scripts; the long one is `make drill N=100`."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def drill(*words):
    command = [sys.executable, str(ROOT / "scripts/fault_drill.py"), *words]
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
