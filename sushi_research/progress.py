"""Progress bars for long work, and timings of the stages of a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from tqdm import tqdm

from sushi_research import stopping


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
    """A tqdm bar on stderr with a rate and an ETA.

    `initial` is the count done by an earlier run; `disable` hides the bar; `leave=False` removes it when it is done; `scale`
    shows counts as 1.2G, for bytes.
    """
    return tqdm(
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

    def __init__(self, first: str, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._seconds = {first: 0.0}
        self._now, self._since = first, clock()

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
        """Seconds of each stage up to now, in the order in which they were first entered."""
        self._settle()
        return dict(self._seconds)

    def _settle(self) -> None:
        now = self._clock()
        self._seconds[self._now] += now - self._since
        self._since = now
