"""The base class of all config sections, and shared value types."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Text = Annotated[str, Field(min_length=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
# The schedule of SD1.5 and SDXL has 1000 timesteps (`diffusion.NUM_TIMESTEPS`); diffusers repeats the lowest for more steps.
SamplingSteps = Annotated[int, Field(ge=1, le=1000)]
Scalar = bool | int | float | str


class Section(BaseModel):
    """Base class of every section: frozen, strict types, no unknown keys, no NaN or infinity."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)
