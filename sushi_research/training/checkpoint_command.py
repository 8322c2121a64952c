"""The user's own command after each checkpoint (`checkpoint.command`). Its failure is a warning, and the run goes on."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from sushi_research import stopping
from sushi_research.config import user_commands
from sushi_research.config.outputs import COMMAND_PLACES
from sushi_research.errors import first_line
from sushi_research.runs.job import Job

logger = logging.getLogger(__name__)

# Of the command's output, the last part is read for the warning.
_MOST_OUTPUT = 2_000


def run(job: Job, step: int, checkpoint: Path, adapter: Path) -> bool:
    """Runs the command for the checkpoint of `step`, and waits for it. Only the main process may call this.

    Returns whether it may run again: not if the user ended it, because the checkpoint of the stop would wait for it once more.

    A stop that is requested meanwhile lets the command finish: it is a session of its own, which Ctrl-C in a terminal does not
    reach. A second request ends it, with SIGTERM; a third kills it.
    """
    command = job.config.checkpoint.command
    if command is None:
        return True
    assert job.run is not None
    values = dict(zip(COMMAND_PLACES, map(str, (job.run.path, step, checkpoint, adapter)), strict=True))
    problem, is_ended = outcome_of(user_commands.words_of(command, values))
    if is_ended:
        logger.warning(
            "step %d: you ended the command %s; it is not run for the checkpoint of this stop", step, command
        )
    elif problem:
        logger.warning("step %d: the command %s %s; the run goes on", step, command, problem)
    return not is_ended


def outcome_of(words: list[str]) -> tuple[str | None, bool]:
    """Runs the words as a command: (what went wrong, as the rest of a sentence; whether the user ended it)."""
    if shutil.which(words[0]) is None:
        return f"was not run: there is no program {words[0]}", False
    try:
        # A file, because a pipe would stay open as long as a process that the command leaves in the background.
        output = tempfile.TemporaryFile()
    except OSError as error:
        return f"was not run: there is no place for what it prints ({first_line(error)})", False
    with output:
        try:
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        except (OSError, ValueError) as error:
            return f"was not run: {first_line(error)}", False
        with _second_signal_ends(process) as signals:
            status = process.wait()
        output.seek(max(0, output.seek(0, os.SEEK_END) - _MOST_OUTPUT))
        lines = output.read().decode(errors="replace").strip().splitlines()
    is_ended = len(signals) > 1
    if status == 0:
        return None, is_ended
    how = f"exit status {status}" if status > 0 else f"signal {-status}"
    return f"failed ({how}); the last that it said: {lines[-1] if lines else 'nothing'}", is_ended


@contextlib.contextmanager
def _second_signal_ends(process: subprocess.Popen[bytes]) -> Iterator[list[float]]:
    """The times of the signals that had an effect, for a block that waits for the command.

    A signal requests a stop as before, one more than a few seconds later ends the command and what it started, and a third, if that
    does not help, kills them. Ctrl-C under a launcher arrives twice at once.
    """
    before = {number: signal.getsignal(number) for number in stopping.SIGNALS}
    seen: list[float] = []

    def on_signal(number: int) -> None:
        handler = before[number]
        if not seen:
            seen.append(time.monotonic())
            if callable(handler):
                handler(number, None)
            stopping.tell(f"waiting for the end of checkpoint.command; another {signal.Signals(number).name} ends it")
        elif time.monotonic() - seen[-1] > stopping.ONE_REQUEST:
            _end(process, kill=len(seen) > 1)
            seen.append(time.monotonic())

    with stopping.on_signals(on_signal):
        yield seen


def _end(process: subprocess.Popen[bytes], kill: bool) -> None:
    """Ends the command and the processes of its session, such as those of a shell."""
    if os.name == "nt":
        process.terminate()
    elif process.returncode is None:  # else its number may be that of another process
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL if kill else signal.SIGTERM)
