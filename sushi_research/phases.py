"""Where a run's time goes: seconds by phase."""

from __future__ import annotations

import time
from collections.abc import Callable


class Phases:
    """Counts wall-clock seconds for the phase entered last; a phase may be entered again."""

    def __init__(self, first: str, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._seconds = {first: 0.0}
        self._now, self._since = first, clock()

    def enter(self, name: str) -> None:
        """Ends the current phase and begins or resumes the phase `name`."""
        self._settle()
        self._now = name
        self._seconds.setdefault(name, 0.0)

    def seconds(self) -> dict[str, float]:
        """Seconds of each phase up to now, in the order in which they were first entered."""
        self._settle()
        return dict(self._seconds)

    def _settle(self) -> None:
        now = self._clock()
        self._seconds[self._now] += now - self._since
        self._since = now
