"""Importing large libraries without the garbage collector, which would search all of their objects again and again for nothing."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def importing(library: str) -> Iterator[None]:
    """A block that imports `library` and others. Without the collector torch, diffusers and peft take a fifth less time.

    What is there after its first import is kept out of all later collections, which then take little time.
    """
    first, enabled = library not in sys.modules, gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if first:
            gc.freeze()
        if enabled:
            gc.enable()
