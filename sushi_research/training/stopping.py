"""Stops at a step boundary on SIGINT, on SIGTERM, and when the launcher has ended.

The training loop calls `poll()` once per step and sums the result over the processes, so all of them stop at the same
step, save and exit. A signal never interrupts a save, and a second signal has no effect.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Mapping
from types import FrameType

# `accelerate launch` sets this for every script that it starts, with one process or many (accelerate/utils/launch.py).
# Nobody sets it by hand.
_LAUNCHER_VARIABLE = "ACCELERATE_DYNAMO_MODE"


class StopRequest:
    """A context manager in which SIGINT and SIGTERM request a stop instead of ending the process.

    `reason` is None or the first cause: "SIGINT", "SIGTERM" or "the launcher ended". `signals` counts the signals.
    Signals that were already ignored (nohup, a shell's background job) stay ignored. Outside the main thread Python
    allows no signal handlers, so only the launcher is watched. With `announce`, a request is reported on stderr.
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
        """1 if this process should stop, else 0. Costs one system call."""
        if self.reason is None and self.launcher_died():
            self._ask("the launcher ended")
        return int(self.reason is not None)

    @property
    def exit_status(self) -> int:
        """The exit status after a requested stop: 128 + the signal number, the convention of shells and job schedulers.

        If another process got the signal, or the launcher ended, it is that of SIGTERM.
        """
        return 128 + (signal.SIGINT if self.reason == "SIGINT" else signal.SIGTERM)

    def launcher_died(self) -> bool:
        """Whether `accelerate launch` started this process and has ended: another process has become the parent.

        The launcher does not forward SIGTERM to a single process, which would otherwise continue training unnoticed. A
        script that was started by hand does not stop when its shell ends. Always False on Windows, where the parent id
        does not change.
        """
        return self._parent is not None and os.getppid() != self._parent

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.signals += 1
        if self.reason is None:
            self._ask(signal.Signals(number).name)

    def _ask(self, reason: str) -> None:
        self.reason = reason
        if self._announce:
            # os.write, because the handler may interrupt another print, where print() would raise. The write fails
            # with OSError if the terminal has been closed.
            with contextlib.suppress(OSError):
                os.write(2, f"\n{reason}: stopping at the next step boundary, with a checkpoint\n".encode())
