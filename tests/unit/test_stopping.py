"""Signals ask and never interrupt; a launcher that dies is noticed, a shell that ends is not."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from sushi_research.config.process import run_main
from sushi_research.stopping import SIGNALS, Stopped, StopRequest, doing, stoppable

pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX signals and parents")
LAUNCHED = {"ACCELERATE_DYNAMO_MODE": "default"}


@pytest.fixture(autouse=True)
def as_in_the_foreground():
    """In a job of a shell's background SIGINT is ignored, and under nohup SIGHUP, and so they would stay."""
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_asks_for_a_stop_once(number, capfd):
    with StopRequest() as stop:
        assert (stop.poll(), stop.reason) == (0, None)
        for _ in range(3):
            os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGINT)
        assert (stop.poll(), stop.reason, stop.signals) == (1, number.name, 4)
        assert stop.poll() == 1
    assert capfd.readouterr().err == f"\n{number.name}: stopping at the next step boundary, with a checkpoint\n"


def test_between_two_steps_a_signal_stops_at_once():
    with stoppable(), StopRequest() as stop:
        with pytest.raises(Stopped) as caught, stop.at_once():
            os.kill(os.getpid(), signal.SIGHUP)
        assert caught.value.exit_status == 129
        os.kill(os.getpid(), signal.SIGTERM)
        assert (stop.poll(), stop.exit_status) == (1, 143), "within a step it is recorded"
        with pytest.raises(Stopped) as caught, stop.at_once():
            raise AssertionError("a stop that was requested before does not wait")
        assert caught.value.exit_status == 143


def test_other_processes_of_the_run_ask_quietly(capfd, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    for world, printed in (("2", ""), (None, "\nSIGTERM: stopping at the next step boundary, with a checkpoint\n")):
        # A RANK by itself, as some clusters set it, is no other process.
        monkeypatch.setenv("WORLD_SIZE", world) if world else monkeypatch.delenv("WORLD_SIZE")
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.poll() == 1
        assert capfd.readouterr().err == printed


@pytest.mark.parametrize("number", [None, signal.SIGTERM])
def test_what_a_library_makes_of_a_stop_is_that_stop(number, capfd):
    def main(_):
        with doing("caching", "three images are kept"):
            try:
                raise KeyboardInterrupt if number is None else Stopped(number)
            except Stopped:
                raise RuntimeError("interrupted")  # noqa: B904 - as a library may do

    with pytest.raises(SystemExit) as ended:
        run_main(main, None)
    number = number or signal.SIGINT
    assert ended.value.code == 128 + number
    assert capfd.readouterr().err == f"{number.name} while caching: three images are kept\n"


def test_a_signal_while_an_error_is_left_says_what_that_one_left():
    with pytest.raises(Stopped) as caught:
        try:
            with doing("caching", "three images are kept"):
                raise RuntimeError("the other process is gone")
        except RuntimeError:
            raise Stopped(signal.SIGTERM)  # noqa: B904 - as the handler does
    assert str(caught.value) == "SIGTERM while caching: three images are kept"


def test_the_handlers_are_given_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(RuntimeError), StopRequest():
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] != before
        raise RuntimeError
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.poll() == 0
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_outside_the_main_thread_it_does_no_harm():
    polled = []

    def work():
        with StopRequest() as stop:
            polled.append(stop.poll())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert polled == [0]


def test_a_standard_error_that_is_gone_does_no_harm():
    script = """
        import os, signal
        from sushi_research.stopping import StopRequest

        with StopRequest() as stop:
            os.close(2)
            os.kill(os.getpid(), signal.SIGTERM)
            print(stop.poll())
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True)
    assert (done.returncode, done.stdout) == (0, "1\n")


def orphan(environment):
    """What a script polls, before and after its parent has ended."""
    script = """
        import os, sys, time
        from sushi_research.stopping import StopRequest

        with StopRequest() as stop:
            parent = os.getppid()
            print(stop.poll(), stop.reason, flush=True)  # after this line the parent is killed
            sys.stdin.readline()
            while os.getppid() == parent:
                time.sleep(0.001)
            print(stop.poll(), stop.reason, flush=True)
    """
    parent = """
        import subprocess, sys

        child = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
        child.wait()
    """
    clean = {key: value for key, value in os.environ.items() if not key.startswith("ACCELERATE_")}
    launcher = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(parent), textwrap.dedent(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=clean | environment,
    )
    before = launcher.stdout.readline()
    launcher.kill()
    launcher.wait()
    launcher.stdin.write("\n")
    launcher.stdin.close()
    with launcher.stdout:
        return [before, *launcher.stdout]


def test_a_script_notices_that_its_launcher_is_gone():
    assert orphan(LAUNCHED) == ["0 None\n", "1 the launcher ended\n"]


def test_other_work_too_stops_when_the_launcher_is_gone(monkeypatch):
    monkeypatch.setenv(*next(iter(LAUNCHED.items())))
    with pytest.raises(Stopped) as caught, stoppable():
        monkeypatch.setattr(os, "getppid", lambda: -1)
        time.sleep(60)
    assert str(caught.value).startswith("the launcher ended while working") and caught.value.exit_status == 143


def test_a_script_started_by_hand_outlives_its_shell():
    assert orphan({}) == ["0 None\n", "0 None\n"]


@pytest.mark.parametrize("flags", [[], ["--multi_gpu", "--num_processes", "2"]])
def test_accelerate_launch_sets_what_we_look_for(flags, monkeypatch):
    """The assumption of the two tests above, checked against the installed accelerate."""
    from accelerate.commands import launch
    from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

    monkeypatch.delenv("ACCELERATE_DYNAMO_MODE", raising=False)
    arguments = launch.launch_command_parser().parse_args([*flags, "script.py"])
    arguments, _, _ = launch._validate_launch_command(arguments)
    environment = prepare_multi_gpu_env(arguments) if flags else prepare_simple_launcher_cmd_env(arguments)[1]
    assert "ACCELERATE_DYNAMO_MODE" in environment
