"""Runs scripts as a user does, in processes forked from a server that has already imported the libraries.

A new interpreter spends ten seconds on imports. A forked process runs `python SCRIPT WORDS...` immediately. It has its own process
id, signals, exit status, standard output and standard error. Tests that depend on starting the interpreter (which modules a
script imports, `accelerate launch`) must launch the script for real.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# Seconds. A process that takes longer is considered hung.
PATIENCE = 300.0


class ForkedScript:
    """A script that runs in its own process; its output goes to the files `out` and `err` in `folder`."""

    def __init__(
        self, script: str, words: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        """Starts `script` (relative to the repository) with the arguments `words`; `environment` is added to this process's."""
        folder.mkdir(parents=True, exist_ok=True)
        self._files = folder / "out", folder / "err"
        for file in self._files:
            file.write_bytes(b"")
        variables = {**os.environ, **(environment or {})}
        arguments = (ROOT, script, [str(word) for word in words], *self._files, variables)
        self._process = server().Process(target=_run, args=arguments, daemon=True)
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """The exit status (negative signal number if a signal ended it), or None while it runs."""
        return self._process.exitcode

    def wait(self) -> int:
        """Waits for the end and returns the exit status. Kills a script that hangs and raises TimeoutError."""
        self._process.join(PATIENCE)
        if self._process.exitcode is None:
            self.kill()
            raise TimeoutError(f"the script hung: {self.err[-2000:]}")
        return self._process.exitcode

    def wait_for(self, file: Path, text: str = "") -> None:
        """Returns when `file` exists and contains `text`; AssertionError if the script ends before that."""
        self.wait_until(lambda: file.exists() and text in file.read_text(errors="replace"))

    def wait_until(self, condition: Callable[[], Any]) -> None:
        """Returns when the condition holds; AssertionError if the script ends before that."""
        while not condition():
            assert self.poll() is None, self.err
            time.sleep(0.005)

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """Sends SIGKILL if the script is running."""
        if self.poll() is None:
            self.send_signal(signal.SIGKILL)
        self._process.join()

    @property
    def out(self) -> str:
        return self._files[0].read_text(errors="replace")

    @property
    def err(self) -> str:
        return self._files[1].read_text(errors="replace")


def server() -> multiprocessing.context.ForkServerContext:
    """The multiprocessing context of the fork server; each process that calls this has one server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["testing.preloaded"])
    return context


def ranks(world: int, port: int) -> list[dict[str, str]]:
    """The environment of each of `world` processes on this machine, as a launcher sets it."""
    return [
        {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        for rank in range(world)
    ]


def free_port() -> int:
    """A port that is not in use."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def become_a_program(out: Path, err: Path) -> None:
    """Redirects standard output and standard error to files, and restores Ctrl-C, which a fork server's children ignore, and
    SIGHUP, which `nohup` ignores."""
    for number, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def _run(root: Path, script: str, words: Sequence[str], out: Path, err: Path, environment: Mapping[str, str]) -> None:
    """Target of the process: runs `python script words...` in the folder `root`, with `environment` alone."""
    os.chdir(root)
    os.environ.clear()
    os.environ.update(environment)
    become_a_program(out, err)
    sys.argv = [script, *words]
    runpy.run_path(script, run_name="__main__")
