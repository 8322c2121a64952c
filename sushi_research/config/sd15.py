"""The config sections that are specific to SD1.5 training."""

from __future__ import annotations

from pydantic import Field

from sushi_research.config.inputs import DataSection, ModelSection
from sushi_research.config.outputs import SampleSection
from sushi_research.config.section import Guidance, Side
from sushi_research.config.training import TrainingConfig


class SD15ModelSection(ModelSection):
    """The frozen base model: Stable Diffusion 1.5."""

    clip_skip: int = Field(
        1, ge=1, le=11, description="CLIP layer to condition on: 1 = the last, 2 = the second to last (anime models)"
    )


class SD15DataSection(DataSection):
    """The training images and their captions."""

    resolution: Side = Field(512, description="Buckets have about this area: resolution x resolution pixels")


class SD15SampleSection(SampleSection):
    """Sample images, generated while training."""

    guidance: Guidance = Field(7.0, description="Classifier-free guidance scale; 1 = none")


class SD15Training(TrainingConfig):
    """A LoRA for Stable Diffusion 1.5."""

    model: SD15ModelSection
    data: SD15DataSection
    sample: SD15SampleSection = Field(default_factory=SD15SampleSection)
