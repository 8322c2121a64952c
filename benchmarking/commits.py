"""Times the training step of two commits, alternated: each in a process of its own, with the commit's own files."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarking.measured_code import ROOT
from sushi_research.errors import UserError

WORKER = Path(__file__).with_name("step_worker.py")


class Worker:
    """A process that takes steps of one commit. Calling it takes the step of that index and returns the loss."""

    def __init__(self, folder: Path, words: Sequence[str]) -> None:
        environment = os.environ | {"PYTHONPATH": str(folder)}
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER), *words],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(folder / "worker.log").open("wb"),
            text=True,
        )
        self._log = folder / "worker.log"
        self.cpu_seconds = 0.0
        self.facts = self._answer()

    def __call__(self, index: int) -> float:
        found = self._ask({"step": index})
        self.cpu_seconds = found["cpu"]
        return found["loss"]

    def counts(self, index: int) -> dict[str, int]:
        """The counts of the step of that index (`op_counts.Counts`)."""
        return self._ask({"count": index})

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()

    def _ask(self, request: dict[str, int]) -> dict[str, Any]:
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            pass  # the reason is in its log
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            end = self._log.read_text(errors="replace").strip().split("\n")[-1]
            raise UserError(f"the steps of {self._log.parent.name} cannot be timed ({end}): choose a later commit.")
        return json.loads(line)


@contextlib.contextmanager
def workers(commits: Sequence[str], words: Sequence[str], folder: Path) -> Iterator[list[Worker]]:
    """A worker for each commit, with its files in a folder of its own below `folder`; `words` are options of the harness."""
    with contextlib.ExitStack() as closing:
        started = []
        for letter, commit in zip("ab", commits, strict=True):
            place = folder / f"{letter}-{full_name(commit)[:10]}"
            extract(commit, place)
            started.append(Worker(place, words))
            closing.callback(started[-1].close)
        yield started


def full_name(commit: str) -> str:
    """The full name of a commit, branch or tag. UserError if git does not know it."""
    command = ["git", "rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if found.returncode:
        raise UserError(
            f"git does not know {commit or 'an empty name'} as a commit: give a hash, branch or tag of this repository as A and B."
        )
    return found.stdout.strip()


def extract(commit: str, folder: Path) -> None:
    """The files of a commit, in a new folder."""
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="data")
