"""Ctrl-C, and the end of the terminal, for the jobs of submitit's local executor: they save before they end.

The terminal sends the signal to all processes of this command. submitit's would end at once, and kill the job a second later. So
they are started with these signals held back, which is inherited, and the job takes them while it works.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from sushi_research.experiments.run_command import IN_JOB

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGHUP") if hasattr(signal, name))


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """In the block these signals wait for its end; in processes that are started there, until they take them."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def taken(action: Callable[[int], object]) -> Iterator[None]:
    """In the block the first of these signals, which may have been held back, calls `action`, if this is a job of submitit's.

    Further ones have no effect: Ctrl-C comes from the terminal and from `ClusterJobs.stop`.
    """
    if IN_JOB not in os.environ or threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []

    def act(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if len(came) == 1:
            action(number)

    handlers = {number: signal.signal(number, act) for number in _SIGNALS}
    before = signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
