"""Config section of the averages of the adapter's weights."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from sushi_research.config.section import Every, Section


class EmaSection(Section):
    """Averages of the adapter's weights over the steps. Off unless decay or post_hoc is set (docs/ema.md)."""

    decay: Annotated[float, Field(gt=0, le=0.999999)] | None = Field(
        None,
        description="Keep an exponential moving average with this decay (0.99: about the last 100 steps), in a file of "
        "its own, NAME_ema.safetensors; null = none",
    )
    evaluate: bool = Field(
        False, description="Evaluate and sample with the average of ema.decay instead of the trained weights"
    )
    post_hoc: bool = Field(
        False,
        description="Keep two power-function averages and snapshots of them, from which scripts/reconstruct_ema.py makes the "
        "average of any length afterwards (EDM2)",
    )
    every: Every = Field(
        0.05,
        description="How often to keep a snapshot of both: steps, epochs or a fraction of the run; null = only at the end",
    )
