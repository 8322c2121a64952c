"""The progress of long work, as a bar on a terminal and as lines elsewhere, and timings of the stages of a run."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
from tqdm import tqdm

from sushi_research import stopping, terminal

# Seconds between two lines about a piece of work, where there is no terminal.
SECONDS = 30.0
# Seconds of the shortest stage that is shown.
SHORTEST = 0.05


class Lines(tqdm):
    """The progress of work in plain lines with a time stamp, for logs: one every SECONDS, and one at its end if it took longer.

        2026-11-27 03:12:40 training: 120 of 1000 (12 %), 1.32 step/s, 11:07 left, loss 0.0812

    Libraries (huggingface_hub's `tqdm_class`) make it too, so it takes all of tqdm's arguments.
    """

    monitor_interval = 0  # no thread that looks after it

    def __init__(self, *arguments: Any, **options: Any) -> None:
        options.pop("name", None)  # huggingface_hub's, by which its bars are switched off
        # The library's `disable=None` stands for "where there is no terminal".
        options |= {"disable": bool(options.get("disable")), "mininterval": SECONDS, "miniters": 1, "delay": SECONDS}
        super().__init__(*arguments, **options)

    def refresh(self, nolock: bool = False, lock_args: Any = None) -> None:
        """Prints a line, if the last one is SECONDS old. `update`, `set_postfix` and `tqdm.write` call it."""
        if self._time() - max(self.last_print_t, self.start_t) >= SECONDS:
            self.display()
            self.last_print_n, self.last_print_t = self.n, self._time()

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        terminal.say(f"{datetime.now():%Y-%m-%d %H:%M:%S} {self._line()}", file=sys.stderr)

    def close(self) -> None:
        if not self.disable:
            self.disable = True
            self._decr_instances(self)
            if self._time() - self.start_t >= SECONDS:
                self.display()

    def clear(self, nolock: bool = False) -> None:
        """`tqdm.write` has nothing to clear: a line that is printed stays."""

    def moveto(self, n: int) -> None:
        """Lines do not move the cursor."""

    def _line(self) -> str:
        now = self.format_dict
        done, elapsed = now["n"] - now["initial"], now["elapsed"]
        rate = now["rate"] or (done / elapsed if elapsed else 0.0)

        def amount(value: float) -> str:
            return self.format_sizeof(value, divisor=now["unit_divisor"]) if now["unit_scale"] else f"{value:g}"

        parts = [amount(now["n"])]
        if total := now["total"]:
            parts = [f"{amount(now['n'])} of {amount(total)} ({now['n'] / total:.0%})"]
        if rate:
            unit = now["unit"].strip()
            speed = self.format_sizeof(rate, divisor=now["unit_divisor"]) if now["unit_scale"] else f"{rate:.3g} "
            parts.append(f"{speed}{unit}/s" if rate >= 1 or now["unit_scale"] else f"{1 / rate:.3g} s/{unit}")
        if self.disable or (total and now["n"] >= total):  # it is over
            parts.append(f"in {self.format_interval(elapsed)}")
        elif total and rate:
            parts.append(f"{self.format_interval((total - now['n']) / rate)} left")
        return ", ".join([f"{now['prefix'] or 'progress'}: {parts[0]}", *parts[1:], *filter(None, [now["postfix"]])])


def on_terminal() -> bool:
    """Whether progress is shown as bars: on a terminal, unless it has no width (in some containers), where tqdm shows nothing."""
    if not sys.stderr.isatty():
        return False
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (OSError, ValueError):  # it only looks like one (notebooks)
        return True


def bars_of_libraries() -> type[Lines] | None:
    """The class for the bars of a library that takes one; None = the library's own."""
    return None if on_terminal() else Lines


def progress(
    iterable: Iterable[Any] | None = None,
    *,
    total: int | None = None,
    initial: int = 0,
    description: str,
    unit: str,
    disable: bool = False,
    leave: bool = True,
    scale: bool = False,
) -> tqdm:
    """A tqdm bar on stderr with a rate and an ETA; `Lines` if stderr is no terminal.

    `initial` is the count done by an earlier run; `disable` hides the bar; `leave=False` removes it when it is done; `scale`
    shows counts as 1.2G, for bytes.
    """
    return (tqdm if on_terminal() else Lines)(
        iterable,
        total=total,
        initial=initial,
        desc=description,
        unit=unit if scale else f" {unit}",
        unit_scale=scale,
        unit_divisor=1024 if scale else 1000,
        disable=disable or not stopping.is_first(),  # of several processes only the first one shows the bar
        leave=leave,
        dynamic_ncols=True,
        mininterval=0.5,
        smoothing=0.1,
    )


class StageTimings:
    """Measures wall-clock seconds per stage; a stage may be entered several times."""

    # Whether no object has yet counted the time from the start of this process.
    _process_is_new = True

    def __init__(self, first: str, clock: Callable[[], float] = time.perf_counter, before: float = 0.0) -> None:
        """Begins with the stage `first`, which has lasted `before` seconds already."""
        self._clock = clock
        self._seconds = {first: before}
        self._now, self._since = first, clock()

    @classmethod
    def of_process(cls, first: str) -> StageTimings:
        """Now in the stage `first`. What this process took before is the stage "starting": Python, and the imports of the script.

        Only the first one of a process has that stage.
        """
        before = seconds_of_process() if cls._process_is_new else 0.0
        cls._process_is_new = False
        timings = cls("starting", before=before)
        timings.enter(first)
        return timings

    @property
    def current(self) -> str:
        """The name of the current stage."""
        return self._now

    def enter(self, name: str) -> None:
        """Ends the current stage and begins or resumes the stage `name`."""
        self._settle()
        self._now = name
        self._seconds.setdefault(name, 0.0)

    def seconds(self) -> dict[str, float]:
        """Seconds of each stage up to now, in the order in which they were first entered.

        A stage of less than SHORTEST had nothing to do, such as one that found all cache entries, and is left out.
        """
        self._settle()
        return {name: value for name, value in self._seconds.items() if value >= SHORTEST}

    def _settle(self) -> None:
        now = self._clock()
        self._seconds[self._now] += now - self._since
        self._since = now


def seconds_of_process() -> float:
    """Seconds since this process was started, exact to 10 ms on Linux and to a second elsewhere."""
    try:
        # psutil gives the time of day, from a boot time in whole seconds.
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError, AttributeError):
        return max(0.0, time.time() - psutil.Process().create_time())
