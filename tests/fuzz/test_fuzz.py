"""Readers of users' files read or refuse damaged and hostile files; `make fuzz` tries many more of them."""

import faulthandler
import json
import os
import signal
import time
from pathlib import Path
from random import Random

import pytest

from sushi_research.errors import UserError
from testing.fuzz import __main__ as fuzz
from testing.fuzz import worker
from testing.fuzz.mutations import mutate
from testing.fuzz.readers import READERS, Reader

# About ten CPU seconds in all. "bases" is left to `make fuzz`: making and reading one takes as long as all others, and
# tests/faults/test_hostile_bases.py damages bases too.
INPUTS = {
    "images": 200,
    "photos": 60,
    "masks": 60,
    "captions": 200,
    "configs": 60,
    "command lines": 60,
    "prompts": 60,
    "experiments": 30,
    "tables": 60,
    "weights": 200,
    "adapters": 100,
    "runs": 100,
    "scores": 200,
    "caches": 30,
}


@pytest.mark.slow
def test_no_input_is_more_than_refused(monkeypatch):
    """The inputs that failed once, then new ones: the same in every run."""
    failed = []
    monkeypatch.setattr(
        fuzz, "_keep", lambda count, reader, current, why, data: failed.append((reader.name, *current, why))
    )
    spans = [fuzz.Span(reader, 0, INPUTS[reader.name]) for reader in READERS if reader.name in INPUTS]
    counts = {reader.name: fuzz.Count() for reader in READERS}
    fuzz.run_spans(spans, 0, counts, lambda: None)
    assert failed == []
    for span in spans:
        count = counts[span.reader.name]
        assert count.inputs == span.last + len(worker.corpus(span.reader))
        assert count.refused and count.accepted, "the changes are neither all harmless nor all fatal"


def test_inputs_are_a_function_of_seed_and_number():
    files = {"a.json": json.dumps({"a": [1, 2.5, "x"], "b": {"c": None}}).encode(), "b.bin": bytes(range(256)) * 4}
    reader = READERS[0]
    one = [worker.make_input(reader, files, 0, number) for number in range(300)]
    assert one == [worker.make_input(reader, files, 0, number) for number in range(300)]
    assert one != [worker.make_input(reader, files, 1, number) for number in range(300)]
    assert len(set(one)) > 250
    assert all(isinstance(mutate(b"", [b""], Random(number)), bytes) for number in range(300)), "an empty file too"


def _read_badly(folder: Path, name: str) -> None:
    """A reader with a fault for each first letter."""
    text = (folder / name).read_bytes()[:1]
    if text == b"a":
        os.kill(os.getpid(), signal.SIGSEGV)
    if text == b"b":
        time.sleep(60)
    if text == b"c":
        len(b"x" * (200 * 2**20))
    if text == b"d":
        raise KeyError("a traceback")
    if text == b"e":
        raise UserError("")
    if text == b"f":
        raise UserError("a sentence")


@pytest.mark.slow
def test_every_kind_of_failure_is_found_and_attributed(tmp_path, monkeypatch):
    """A forked worker in place of a new process: it has the reader of this test, and starts at once."""
    reader = Reader(
        "bad", ("*",), lambda folder: (folder / "file").write_bytes(b"sound"), _read_badly, memory=100 * 2**20
    )
    monkeypatch.setattr(worker, "READERS", [reader])
    monkeypatch.setattr(
        worker, "make_input", lambda reader, files, seed, number: ("file", b"abcdefs"[number : number + 1])
    )
    monkeypatch.setattr(fuzz, "SECONDS", 5)
    monkeypatch.setattr(fuzz, "CORPUS", tmp_path)
    monkeypatch.setattr(fuzz.subprocess, "Popen", _Forked)
    count = fuzz.Count()
    fuzz.run_spans([fuzz.Span(reader, 0, 7)], 0, {"bad": count}, lambda: None)
    assert (count.accepted, count.refused, count.failed) == (1, 1, 5)
    found = {label: why for label, _, why in count.failures}
    assert found["0"] == "ended the process by SIGSEGV" and found["1"] == "took more than 5 s"
    assert (
        found["2"].startswith("took ")
        and found["2"].endswith(" MiB")
        and found["3"].startswith("KeyError at test_fuzz.py:")
    )
    assert found["4"].startswith("not one line")
    assert sorted(path.read_bytes() for path in tmp_path.rglob("*__file")) == [b"a", b"b", b"c", b"d", b"e"]


class _Forked:
    """`subprocess.Popen` of a worker, as a fork of this process."""

    def __init__(self, words, **_):
        ours, theirs = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            faulthandler.disable()
            os.dup2(theirs, 1)
            worker.main(words[3:])
            os._exit(0)
        os.close(theirs)
        self.stdout = os.fdopen(ours, "rb")
        self._status = None

    def kill(self):
        if self._status is None:
            os.kill(self.pid, signal.SIGKILL)

    def wait(self):
        if self._status is None:
            status = os.waitpid(self.pid, 0)[1]
            self._status = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        return self._status
