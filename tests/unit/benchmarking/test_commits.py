"""The processes of two commits: their files, their answers, and what cannot be timed."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarking import commits
from sushi_research.errors import UserError

ECHO = """
import json, sys
print(json.dumps({"device": "cpu", "precision": "fp32"}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    if request.get("step") == 3:
        sys.exit("step 3 is broken")
    print(json.dumps({"loss": request.get("step", 0) / 2, "cpu": 1.5, "ops": 7}), flush=True)
"""


def test_a_worker_takes_steps_until_it_fails(tmp_path: Path, monkeypatch) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(ECHO)
    monkeypatch.setattr(commits, "WORKER", worker)
    found = commits.Worker(tmp_path, ["--model", "sd15"])
    assert found.facts["precision"] == "fp32"
    assert (found(1), found(2), found.cpu_seconds, found.counts(5)["ops"]) == (0.5, 1.0, 1.5, 7)
    with pytest.raises(UserError, match=r"cannot be timed \(step 3 is broken\)"):
        found(3)
    found.close()


def test_the_files_are_those_of_the_commit(tmp_path: Path) -> None:
    commits.extract("HEAD", tmp_path / "files")
    assert (tmp_path / "files/benchmarking/__main__.py").is_file()
    assert len(commits.full_name("HEAD")) == 40
    with pytest.raises(UserError, match="git does not know no-such-commit as a commit"):
        commits.full_name("no-such-commit")
