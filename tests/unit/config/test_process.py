"""How a script ends: one line and the right exit status for every signal."""

import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from sushi_research import stopping
from sushi_research.config import process
from sushi_research.config.process import run_main
from sushi_research.errors import UserError

pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def in_the_foreground(monkeypatch):
    """In a job of a shell's background SIGINT is ignored, and so it would stay."""
    for number in stopping.SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    monkeypatch.delenv("RANK", raising=False)


@pytest.fixture
def ended(capfd):
    """Runs a main function; gives the exit status and what was printed on stderr."""

    def run(main):
        with pytest.raises(SystemExit) as caught:
            run_main(main, None)
        return caught.value.code, capfd.readouterr().err

    return run


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", stopping.SIGNALS)
def test_a_signal_ends_in_one_line_and_128_plus_its_number(ended, number):
    def main(config):
        with (
            stopping.doing("planning", "nothing"),
            stopping.doing(lambda: "caching", lambda: "what is encoded is kept"),
        ):
            send(number)

    assert ended(main) == (128 + number, f"{number.name} while caching: what is encoded is kept\n")
    assert all(signal.getsignal(each) is signal.SIG_DFL for each in stopping.SIGNALS), "the handlers are given back"


def test_a_second_signal_lets_the_first_one_finish(ended):
    finished = []

    def main(config):
        try:
            send(signal.SIGINT)
        finally:
            send(signal.SIGTERM)
            finished.append(True)

    assert ended(main)[0] == 130 and finished


def test_an_ignored_signal_stays_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    run_main(lambda config: send(signal.SIGHUP), None)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_an_error_that_a_stop_led_to_is_that_stop(ended):
    def main(config):
        try:
            send(signal.SIGTERM)
        finally:
            raise RuntimeError("Connection closed by peer")

    assert ended(main)[0] == 143


def test_what_cannot_be_saved_is_said(ended):
    def main(config):
        try:
            send(signal.SIGTERM)
        finally:
            raise UserError("the disk is full")

    assert ended(main) == (2, "error: the disk is full\n")


def test_of_several_processes_one_prints(ended, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert ended(lambda config: send(signal.SIGTERM)) == (143, "")


def test_while_libraries_are_imported_a_signal_ends_the_script_at_once():
    code = (
        "import os, signal; from sushi_research.config.process import begin; begin(); os.kill(os.getpid(), signal.{})"
    )
    for number in (signal.SIGINT, signal.SIGHUP):
        command = [sys.executable, "-c", code.format(number.name)]
        done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
        line = f"\n{number.name} while starting: nothing is written yet; run the same command again\n"
        assert (done.returncode, done.stderr) == (128 + number, line)


def test_warnings_of_libraries_are_no_errors(monkeypatch):
    """Under PYTHONWARNINGS=error they are shown."""
    monkeypatch.setattr(process.terminal, "prepare", lambda: None)
    monkeypatch.setattr(process.stopping, "end_at_once", lambda: None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("error")
        process.begin()
        warnings.warn("an old way", DeprecationWarning, stacklevel=1)
    assert [str(warning.message) for warning in caught] == ["an old way"]
