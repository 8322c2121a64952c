"""What can be configured of `scripts/evaluate.py`: a training's config, whose data and base it takes, and the adapters."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from sushi_research.config import SD15Training, SDXLTraining
from sushi_research.config.section import Section, Text


class Judged(Section):
    """The adapter files that are evaluated, and where the results go."""

    adapters: list[Text] = Field(
        [], description="Adapter files (.safetensors), of any trainer; the base is always evaluated"
    )
    strengths: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1)] = Field(
        [1.0], description="Strengths of each adapter; several make a sweep, drawn as a curve and a grid of pictures"
    )
    output: Text = Field(
        "evaluations", description="Folder of the results: one folder in it for the base and each adapter"
    )

    @model_validator(mode="after")
    def _distinct(self) -> Judged:
        for name in ("adapters", "strengths"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name} has an entry twice: keep one of each")
        return self


class SD15Judging(Judged, SD15Training):
    """Adapters for Stable Diffusion 1.5, evaluated."""


class SDXLJudging(Judged, SDXLTraining):
    """Adapters for Stable Diffusion XL, evaluated."""
