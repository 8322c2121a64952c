"""Progress bars: one look for every long piece of work."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def progress(
    iterable: Iterable[Any] | None = None,
    *,
    total: int | None = None,
    initial: int = 0,
    description: str,
    unit: str,
    disable: bool = False,
    leave: bool = True,
) -> tqdm:
    """A tqdm bar on stderr with a rate and an ETA.

    `initial` counts what an earlier run did; `disable` it off the main process; `leave=False` wipes it when it is done.
    """
    return tqdm(
        iterable,
        total=total,
        initial=initial,
        desc=description,
        unit=f" {unit}",
        disable=disable,
        leave=leave,
        dynamic_ncols=True,
        mininterval=0.5,
        smoothing=0.1,
    )
