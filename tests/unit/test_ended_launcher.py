"""A run that was asked to stop and still saves says so: on the terminal if its launcher has ended, and in its lock's note."""

import os
import signal

import pytest

from sushi_research.errors import UserError
from sushi_research.runs.run_folder import open_run_folder
from sushi_research.stopping import Stopped, StopRequest

pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX signals and parents")
LAUNCHED = {"ACCELERATE_DYNAMO_MODE": "default"}


@pytest.fixture(autouse=True)
def as_in_the_foreground(monkeypatch):
    """In a job of a shell's background SIGINT is ignored; and earlier tests have sent signals less than five seconds ago."""
    monkeypatch.setattr("sushi_research.stopping._Request.at", None)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_after_ctrl_c_the_launcher_ends_and_the_run_goes_on(monkeypatch, capfd):
    parent = os.getppid()
    with StopRequest(LAUNCHED) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.poll() == 1
        assert capfd.readouterr().err == "\nSIGINT: stopping at the next step boundary, with a checkpoint\n"
        monkeypatch.setattr(os, "getppid", lambda: parent + 1)
        os.kill(os.getpid(), signal.SIGTERM)  # as Launcher.watched does
        assert stop.poll() == 1
        expected = f"the launcher has ended, and this process ({os.getpid()}) still finishes its last step and saves"
        assert capfd.readouterr().err == f"\n{expected}: wait for its end\n", "once"
        assert stop.exit_status == 130


def test_a_launcher_that_ends_first_is_said_once(monkeypatch, capfd):
    parent = os.getppid()
    with StopRequest(LAUNCHED) as stop:
        monkeypatch.setattr(os, "getppid", lambda: parent + 1)
        assert stop.poll() == 1
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.poll() == 1
    assert capfd.readouterr().err == "\nthe launcher ended: stopping at the next step boundary, with a checkpoint\n"


@pytest.mark.parametrize("between_steps", [False, True])
def test_the_lock_says_that_the_run_is_finishing(tmp_path, between_steps):
    with open_run_folder(tmp_path, "run") as run, StopRequest(note=run.note_stop) as stop:
        with pytest.raises(UserError, match=r"in use by process \d+ on \S+: wait for it"):
            open_run_folder(tmp_path, "run")
        if between_steps:
            with pytest.raises(Stopped), stop.at_once():
                os.kill(os.getpid(), signal.SIGINT)
        else:
            os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(UserError) as caught:
            open_run_folder(tmp_path, "run")
        assert ", which was asked to stop and is finishing its last step: wait for it or stop it" in str(caught.value)
    with open_run_folder(tmp_path, "run"):
        assert "asked to stop" not in (tmp_path / "run" / ".lock").read_text()
    run.note_stop()  # a signal after its end
