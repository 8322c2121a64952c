"""What the config of an SDXL training has in place of the shared sections."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sushi_research.config.inputs import DataSection, ModelSection
from sushi_research.config.training import TrainingConfig


class SDXLModelSection(ModelSection):
    """The frozen base model: Stable Diffusion XL."""

    text_encoder_1_layer: Literal["penultimate", "last"] = Field(
        "penultimate",
        description="Layer of text encoder 1: penultimate is what SDXL was trained with and what every other program "
        "uses; last (after the final layer norm) repeats this project's founding recipe",
    )


class SDXLDataSection(DataSection):
    """The training images and their captions."""

    resolution: int = Field(1024, ge=8, description="Buckets keep about this area: resolution x resolution pixels")
    time_ids: Literal["image", "bucket"] = Field(
        "image",
        description="Sizes that SDXL is told: image = each image's true size and crop, as SDXL was trained; bucket = "
        "the bucket's size and no crop, which repeats this project's founding recipe",
    )


class SDXLTraining(TrainingConfig):
    """A LoRA for Stable Diffusion XL."""

    model: SDXLModelSection
    data: SDXLDataSection
