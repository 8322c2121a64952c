"""The config section of the timesteps that are trained."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from sushi_research.config.section import Section

LAST = 999  # that of objectives/schedule.py, which imports torch


class TimestepSection(Section):
    """Which timesteps are trained, and how often: 0 has the least noise, 999 the most (docs/objectives.md)."""

    distribution: Literal["uniform", "logit_normal", "sigmoid"] = Field(
        "uniform",
        description="uniform; logit_normal = mostly the middle of the schedule, moved by mean; sigmoid = that with mean 0, as in "
        "kohya",
    )
    mean: float = Field(0.0, ge=-10, le=10, description="Mean of logit_normal: above 0 = more noise, below 0 = less")
    std: float = Field(1.0, ge=0.01, le=100, description="Width of logit_normal and sigmoid (kohya: sigmoid_scale)")
    min: int = Field(0, ge=0, le=LAST, description="The first timestep that is trained")
    max: int = Field(
        LAST, ge=0, le=LAST, description="The last timestep that is trained (kohya's max_timestep is one more)"
    )

    @model_validator(mode="after")
    def _range_is_one(self) -> TimestepSection:
        if self.min > self.max:
            raise ValueError(f"timesteps.min is {self.min}, above timesteps.max, {self.max}: exchange them")
        return self
