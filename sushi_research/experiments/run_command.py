"""The processes of one run of an experiment: the training, then the command that scores it. They can be asked to stop."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import psutil

from sushi_research.errors import UserError
from sushi_research.files import writing

# Of the output of a command, what is kept to find its last line.
_HEARD_BYTES = 4096
# In lines of torchrun's, which follow the last one of the processes that it launched.
_OF_LAUNCHER = "torch/distributed/elastic/"
# submitit sets it in its jobs.
IN_JOB = "SUBMITIT_EXECUTOR"


class RunCommand:
    """Runs one command after the other. What they write goes to this terminal, or to the end of `log`.

    `signal` is that of the first `stop`, 0 if there was none: after it nothing more is started, and the status is that of a process
    that the signal ended. `inherited` are descriptors that the commands keep open, as long as they live.
    """

    def __init__(self, log: Path | None) -> None:
        self.signal = 0
        self.inherited: tuple[int, ...] = ()
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._has_launcher = True

    def train(
        self, command: Sequence[str], environment: Mapping[str, str], *, has_launcher: bool = True
    ) -> tuple[int, str]:
        """Runs a training; returns its exit status and the last line of its output (empty on a terminal).

        `has_launcher`: whether the command is a launcher, whose children are the training. UserError if it cannot be started.
        """
        if self.signal:
            return -self.signal, ""
        if self._log is None:
            return self._start(command, "is accelerate installed?", environment, has_launcher).wait(), ""
        with self._appended() as log:
            begin = log.tell()
            options = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
            status = self._start(command, "is accelerate installed?", environment, has_launcher, **options).wait()
        return status, last_line(self._log, begin)

    def judge(self, command: Sequence[str], environment: Mapping[str, str]) -> tuple[int, str]:
        """Runs any command; returns its exit status and the last line of its output. UserError if it cannot be started."""
        if self.signal:
            return -self.signal, ""
        options = {"has_launcher": False, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        process = self._start(command, "check its path", environment, **options)
        heard: list[bytes] = []
        with contextlib.ExitStack() as stack:
            sink = sys.stdout.buffer if self._log is None else stack.enter_context(self._appended())
            # In a thread that is not waited for long: what the command leaves running may keep the pipe open.
            arguments = (process.stdout, sink.write, sink.flush, heard)
            listener = threading.Thread(target=_show, args=arguments, name="output", daemon=True)
            listener.start()
            status = process.wait()
            listener.join(5.0)
        return status, _last(b"".join(heard))

    def wait(self) -> None:
        """Waits until the command that was started last has ended. For a signal handler, which may have interrupted its `wait`."""
        with contextlib.suppress(psutil.Error):
            while self._process and psutil.Process(self._process.pid).status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.1)

    def stop(self, number: int) -> None:
        """Asks the running command to stop, by SIGTERM: a training saves and stops. Called by signal handlers too."""
        self.signal = self.signal or number
        if self._process is None or self._process.returncode is not None:  # ended: its number may be another's
            return
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(self._process.pid)
            children = process.children(recursive=not self._has_launcher)
            # A launcher of a single process would not forward the signal; any other command ends with all that it started.
            for each in children if self._has_launcher and children else [*children, process]:
                with contextlib.suppress(psutil.Error):
                    each.send_signal(signal.SIGTERM)

    @contextlib.contextmanager
    def _appended(self) -> Iterator[IO[bytes]]:
        with writing("write", self._log), open(self._log, "ab") as file:
            yield file

    def _start(
        self,
        command: Sequence[str],
        advice: str,
        environment: Mapping[str, str],
        has_launcher: bool = True,
        **options: Any,
    ) -> subprocess.Popen[bytes]:
        self._has_launcher = has_launcher
        # A cluster sends the signal by which submitit learns of a job's end to all of its processes, and it would end them.
        guard = ["sh", "-c", 'trap "" USR2; exec "$@"', "sh"] if IN_JOB in os.environ else []
        try:
            # In its own session: otherwise Ctrl-C would kill the launcher, and we could not wait for the script.
            self._process = subprocess.Popen(
                [*guard, *command],
                start_new_session=True,
                env={**os.environ, **environment},
                pass_fds=() if os.name == "nt" else self.inherited,
                **options,
            )
        except (OSError, ValueError) as error:  # ValueError: what no argument can hold, such as a zero byte
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{shlex.quote(command[0])} cannot be started ({reason}): {advice}") from None
        if self.signal:  # it came while the process was being created
            self.stop(self.signal)
        return self._process


def last_line(file: Path, begin: int = 0) -> str:
    """The last line of a text file that is not empty, of what was written after the byte `begin`; "" if there is none."""
    try:
        with open(file, "rb") as log:
            end = log.seek(0, os.SEEK_END)
            log.seek(max(begin, end - _HEARD_BYTES))
            return _last(log.read(_HEARD_BYTES))
    except OSError:
        return ""


def _last(text: bytes) -> str:
    lines = [line.strip() for line in text.decode(errors="replace").replace("\r", "\n").split("\n")]
    return next((line for line in reversed(lines) if line and _OF_LAUNCHER not in line), "")


def _show(output: IO[bytes], write: Callable[[bytes], Any], flush: Callable[[], Any], heard: list[bytes]) -> None:
    """Passes on what a command writes, as it comes; `heard` gets the last _HEARD_BYTES of it."""
    while chunk := os.read(output.fileno(), 65536):
        with contextlib.suppress(ValueError):  # the log is closed: the command has ended
            write(chunk)
            flush()
        heard[:] = [b"".join([*heard, chunk])[-_HEARD_BYTES:]]
