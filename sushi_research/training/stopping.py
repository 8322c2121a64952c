"""Stopping at a step boundary: on SIGINT, on SIGTERM, and when the launcher is gone.

A training loop asks `poll()` once per step and takes the maximum over the processes, so that all of them stop
at the same step, save, and leave. A signal thus never interrupts a save, and a second one changes nothing.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Mapping
from types import FrameType

# What `accelerate launch` sets for every script that it starts, on one process or many
# (accelerate/utils/launch.py), and what nobody sets by hand.
_LAUNCHER_VARIABLE = "ACCELERATE_DYNAMO_MODE"


class StopRequest:
    """While it is entered, SIGINT and SIGTERM ask for a stop instead of ending the process.

    `reason` is None, or what asked first: "SIGINT", "SIGTERM" or "the launcher ended". `signals` counts the
    signals. Signals that were ignored before (nohup, a shell's background job) stay ignored. Outside the main
    thread, where Python allows no handlers, only the launcher is watched. `announce` says on stderr that a stop
    is on its way.
    """

    def __init__(self, announce: bool = True, environment: Mapping[str, str] = os.environ) -> None:
        self.reason: str | None = None
        self.signals = 0
        self._announce = announce
        self._parent = os.getppid() if _LAUNCHER_VARIABLE in environment else None
        self._before: dict[signal.Signals, signal._HANDLER] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def poll(self) -> int:
        """1 when this process should stop, else 0. Costs a system call."""
        if self.reason is None and self.launcher_died():
            self._ask("the launcher ended")
        return int(self.reason is not None)

    @property
    def exit_status(self) -> int:
        """What a process that stopped on request ends with: 128 + the signal, as shells and job schedulers read it.

        Where another process was asked, or the launcher ended, it is that of SIGTERM.
        """
        return 128 + (signal.SIGINT if self.reason == "SIGINT" else signal.SIGTERM)

    def launcher_died(self) -> bool:
        """Whether `accelerate launch` started this process and is gone: another process has become the parent.

        The launcher does not pass SIGTERM on to a single process, which would otherwise train on unnoticed. A
        script that was started by hand never stops because its shell has ended. Windows does not tell; there
        it is False.
        """
        return self._parent is not None and os.getppid() != self._parent

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.signals += 1
        if self.reason is None:
            self._ask(signal.Signals(number).name)

    def _ask(self, reason: str) -> None:
        self.reason = reason
        if self._announce:
            # Straight to the descriptor: a handler may run in the midst of another print, where print() would
            # raise. Standard error may be gone with the terminal.
            with contextlib.suppress(OSError):
                os.write(2, f"\n{reason}: stopping at the next step boundary, with a checkpoint\n".encode())
