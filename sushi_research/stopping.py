"""How a command is stopped: by SIGINT (Ctrl-C), SIGTERM, SIGHUP (the terminal was closed), or because its launcher has ended.

While a script imports its libraries, it ends at once. In `main` a signal raises `Stopped` in the main thread, and `run_main` prints
one line: what was stopped, what is kept, and how to go on. In the training loop (`StopRequest`) a signal is only recorded: the loop
calls `poll()` once per step and sums the result over the processes, so all of them stop at the same step, save and exit. There a
signal never interrupts a save. Signals that were already ignored (nohup, a shell's background job) stay ignored.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import FrameType

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))

# `accelerate launch` sets this for every script that it starts, with one process or many (accelerate/utils/launch.py).
# Nobody sets it by hand.
_LAUNCHER_VARIABLE = "ACCELERATE_DYNAMO_MODE"
_ENDED = "the launcher ended"
# Ctrl-C in a terminal reaches a process twice: from the terminal and from the launcher. For so many seconds after a signal further
# ones have no effect, so that they do not interrupt what the first one lets finish.
ONE_REQUEST = 5.0


class Stopped(KeyboardInterrupt):
    """Raised in the main thread by a signal that asks the command to stop.

    Its text says what was stopped, what is kept and how to go on, as the `doing` blocks that it left say. It is a KeyboardInterrupt
    because libraries expect Ctrl-C.
    """

    def __init__(self, number: int, reason: str | None = None) -> None:
        super().__init__()
        self.number = number
        self.reason = reason or signal.Signals(number).name

    @property
    def exit_status(self) -> int:
        """128 + the signal number, the convention of shells and job schedulers."""
        return 128 + self.number

    def __str__(self) -> str:
        doing, kept = _said(self, "doing"), _said(self, "kept")
        return (
            f"{self.reason} while {doing or 'working'}: {kept or 'nothing is kept; the same command again starts over'}"
        )


Text = str | Callable[[], str]


@contextlib.contextmanager
def doing(what: Text, kept: Text | None = None) -> Iterator[None]:
    """Names the work of this block, for the line that is printed if it is stopped. The innermost name counts.

    `kept` says what of it is kept and how to go on. Functions are called when the line is printed.
    """
    try:
        yield
    except BaseException as error:  # an error may turn out to be a stop: of a library, or of another process
        for name, said in (("doing", what), ("kept", kept)):
            if getattr(error, name, None) is None:
                setattr(error, name, said)
        raise


def _said(error: BaseException, name: str) -> str | None:
    """What the blocks that `error` left say; or those that an error left at which it was raised, which it then replaced."""
    for each in _chain(error):
        if (found := getattr(each, name, None)) is not None:
            return found() if callable(found) else found
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, what led to it, what led to that, and so on."""
    seen: list[BaseException] = []
    each: BaseException | None = error
    while each is not None and each not in seen:
        yield each
        seen.append(each)
        each = each.__cause__ or each.__context__


def cause(error: BaseException) -> Stopped | None:
    """The stop that led to `error`, if there was one: an error while the work was left, or of a library that was interrupted."""
    return next((each for each in _chain(error) if isinstance(each, Stopped)), None)


def is_first(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this is the process of a command that prints. A launcher of several sets RANK and WORLD_SIZE."""
    rank, world = environment.get("RANK", ""), environment.get("WORLD_SIZE", "")
    return not (rank.isdecimal() and world.isdecimal() and 0 < int(rank) < int(world))


class _Request:
    """The last signal that had an effect in this process, and whether the command has begun its work."""

    begun = False
    at: float | None = None

    @classmethod
    def is_new(cls) -> bool:
        now, before = time.monotonic(), cls.at
        if before is not None and now - before < ONE_REQUEST:
            return False
        cls.at = now
        return True


@contextlib.contextmanager
def on_signals(action: Callable[[int], None] | None) -> Iterator[None]:
    """Within the block a signal calls `action`. Outside the main thread Python allows no signal handlers, so nothing changes.

    None: the system ends the process, also while it waits in a library's C code, where Python would call no handler.
    """
    before: dict[int, signal._HANDLER] = {}
    instead = signal.SIG_DFL if action is None else lambda number, frame: action(number)
    try:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                handler = signal.getsignal(number)
                if handler not in (signal.SIG_IGN, None):
                    before[number] = handler
                    signal.signal(number, instead)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_at_once() -> None:
    """From now on a signal ends this process at once. For the start of a script and its end, when there is nothing to save."""

    def end(number: int, frame: FrameType | None) -> None:
        if not _Request.is_new():
            return
        if not _Request.begun and is_first():
            # os.write, because the handler may interrupt another print, where print() would raise.
            line = (
                f"\n{signal.Signals(number).name} while starting: nothing is written yet; run the same command again\n"
            )
            with contextlib.suppress(OSError):
                os.write(2, line.encode())
        os._exit(128 + number)

    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                signal.signal(number, end)


class Launcher:
    """`accelerate launch`, if it started this process.

    It does not forward SIGTERM to a single process, which would otherwise go on unnoticed when the launcher has ended.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._parent = os.getppid() if _LAUNCHER_VARIABLE in environment else None

    def has_ended(self) -> bool:
        """Whether another process has become the parent. Costs one system call.

        A script that was started by hand does not stop when its shell ends. Always False on Windows, where the parent id
        does not change.
        """
        return self._parent is not None and os.getppid() != self._parent

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Within the block this process gets SIGTERM, within a second, when the launcher has ended."""
        done = threading.Event()

        def watch() -> None:
            while not done.wait(1.0):
                if self.has_ended():
                    os.kill(os.getpid(), signal.SIGTERM)
                    return

        if self._parent is not None:
            threading.Thread(target=watch, name="launcher", daemon=True).start()
        try:
            yield
        finally:
            done.set()


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Within the block a signal raises `Stopped`, and so does the end of the launcher."""
    _Request.begun, _Request.at = True, None
    launcher = Launcher()
    with on_signals(lambda number: _raise(number, launcher)), launcher.watched():
        yield


def _raise(number: int, launcher: Launcher) -> None:
    if _Request.is_new():
        raise Stopped(number, _ENDED if launcher.has_ended() else None)


class StopRequest:
    """A context manager in which a signal requests a stop instead of ending the process.

    `reason` is None or the first cause: "SIGINT", "SIGTERM", "SIGHUP" or "the launcher ended". `signals` counts the signals.
    Outside the main thread only the launcher is watched. The first process of a command reports a request on stderr, and also that
    it goes on saving when the launcher has ended after it: the shell then shows its prompt. `note` is called once, at the request.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ, note: Callable[[], None] | None = None) -> None:
        self.reason: str | None = None
        self.signals = 0
        self._note = note
        self._asked = self._told = False
        self._launcher = Launcher(environment)
        self._block = contextlib.ExitStack()

    def __enter__(self) -> StopRequest:
        self._block.enter_context(on_signals(self._on_signal))
        return self

    def __exit__(self, *error: object) -> None:
        self._block.close()

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Within the block a stop does not wait for the next step: it raises `Stopped`, also one that was requested just before."""
        if self.reason is not None:
            raise Stopped(self.exit_status - 128, self.reason)
        with on_signals(self._interrupt):
            yield

    def poll(self) -> int:
        """1 if this process should stop, else 0. Costs one system call."""
        if not self._told and self._launcher.has_ended():
            if self.reason is None:
                self._ask(_ENDED)
            else:
                self._tell()
        return int(self.reason is not None)

    @property
    def exit_status(self) -> int:
        """The exit status after a requested stop: 128 + the signal number, the convention of shells and job schedulers.

        If another process got the signal, or the launcher ended, it is that of SIGTERM.
        """
        return 128 + next((number for number in SIGNALS if number.name == self.reason), signal.SIGTERM)

    def _on_signal(self, number: int) -> None:
        self.signals += 1
        _Request.is_new()
        ended = self._launcher.has_ended()
        if ended and self._asked:
            self._tell()
        elif self.reason is None:
            self._ask(_ENDED if ended else signal.Signals(number).name)

    def _interrupt(self, number: int) -> None:
        if _Request.is_new():
            self._begin()
            raise Stopped(number, _ENDED if self._launcher.has_ended() else None)

    def _ask(self, reason: str) -> None:
        self.reason = reason
        self._told = reason == _ENDED  # the line says it
        tell(f"{reason}: stopping at the next step boundary, with a checkpoint")
        self._begin()

    def _begin(self) -> None:
        if not self._asked and self._note:
            self._note()
        self._asked = True

    def _tell(self) -> None:
        """Says, once, that this process goes on without its launcher."""
        if not self._told:
            self._told = True
            tell(
                f"the launcher has ended, and this process ({os.getpid()}) still finishes its last step and saves: wait for "
                "its end"
            )


def tell(line: str) -> None:
    """Prints a line on stderr in the first process of a command.

    A handler may interrupt another print, where print() would raise. The write fails if the terminal has been closed.
    """
    if is_first():
        with contextlib.suppress(OSError):
            os.write(2, f"\n{line}\n".encode())
