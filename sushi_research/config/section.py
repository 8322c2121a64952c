"""The base class of all config sections, shared value types, and the check of texts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from sushi_research import caption_text

Text = Annotated[str, Field(min_length=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
# The schedule of SD1.5 and SDXL has 1000 timesteps (`diffusion.NUM_TIMESTEPS`); diffusers repeats the lowest for more steps.
SamplingSteps = Annotated[int, Field(ge=1, le=1000)]
Scalar = bool | int | float | str


def require_text(texts: Mapping[str, Iterable[str]]) -> None:
    """Raises ValueError for the first text, by dotted key, that could not be a caption (`caption_text.problem`)."""
    for name, group in texts.items():
        for text in group:
            if reason := caption_text.problem(text):
                raise ValueError(f"{name} has {text[:60]!r}, which {reason}: remove that character")


class Section(BaseModel):
    """Base class of every section: frozen, strict types, no unknown keys, no NaN or infinity."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)
