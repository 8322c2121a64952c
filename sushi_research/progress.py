"""Progress bars: one look for every long piece of work."""

from __future__ import annotations

import os
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
    scale: bool = False,
) -> tqdm:
    """A tqdm bar on stderr with a rate and an ETA.

    `initial` counts what an earlier run did; `disable` says nothing; `leave=False` wipes it when it is done;
    `scale` writes counts as 1.2G, for bytes.
    """
    return tqdm(
        iterable,
        total=total,
        initial=initial,
        desc=description,
        unit=unit if scale else f" {unit}",
        unit_scale=scale,
        unit_divisor=1024 if scale else 1000,
        # Where several processes do the same, the first one tells of it: torch's launcher numbers them.
        disable=disable or os.environ.get("RANK", "0") != "0",
        leave=leave,
        dynamic_ncols=True,
        mininterval=0.5,
        smoothing=0.1,
    )
