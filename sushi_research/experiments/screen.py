"""A table that stays at the end of a terminal and is drawn again as it changes. Elsewhere only the lines above it are printed."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from typing import TextIO

from sushi_research.errors import printable
from sushi_research.terminal import say

# Seconds between two drawings.
EVERY = 1.0


class Screen:
    """Prints lines and, on a terminal, below them the table that `lines_of(most lines)` gives."""

    def __init__(self, lines_of: Callable[[int], Sequence[str]], is_terminal: bool | None = None) -> None:
        self._lines_of = lines_of
        self._is_terminal = _is_terminal() if is_terminal is None else is_terminal
        self._lines: list[str] = []  # of the table that is on the screen
        self._at = float("-inf")

    def say(self, line: str, file: TextIO | None = None) -> None:
        """Prints a line above the table."""
        self.clear()
        say(line, file=file)

    def refresh(self) -> None:
        """Draws the table, at most once in EVERY seconds."""
        if not self._is_terminal or time.monotonic() - self._at < EVERY:
            return
        size = shutil.get_terminal_size()
        lines = [printable(line)[: size.columns - 1] for line in self._lines_of(max(size.lines - 2, 3))]
        if lines != self._lines:
            self.clear()
            sys.stdout.write("".join(f"{line}\n" for line in lines))
            sys.stdout.flush()
        self._lines, self._at = lines, time.monotonic()

    def clear(self) -> None:
        """Removes the table from the screen."""
        if self._lines:
            sys.stdout.write(f"\x1b[{len(self._lines)}F\x1b[J")  # to the line where it begins; all below
            sys.stdout.flush()
        self._lines, self._at = [], float("-inf")


def _is_terminal() -> bool:
    """Whether standard output is a terminal on which the cursor can be moved."""
    return sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
