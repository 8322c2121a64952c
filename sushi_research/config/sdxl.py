"""The config sections that are specific to SDXL training."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sushi_research.config.captions import CaptionSection
from sushi_research.config.inputs import DataSection, ModelSection
from sushi_research.config.section import Side
from sushi_research.config.text_encoders import TwoTextEncoderSection
from sushi_research.config.training import TrainingConfig


class SDXLModelSection(ModelSection):
    """The frozen base model: Stable Diffusion XL."""

    text_encoder_1_layer: Literal["penultimate", "last"] = Field(
        "penultimate",
        description="Layer of text encoder 1: penultimate, as SDXL was trained and as other programs use it, or last (after "
        "the final layer norm), as in this project's original recipe",
    )


class SDXLDataSection(DataSection):
    """The training images and their captions."""

    resolution: Side = Field(1024, description="Buckets have about this area: resolution x resolution pixels")
    time_ids: Literal["image", "bucket"] = Field(
        "image",
        description="Size conditioning (SDXL's time_ids): image = each image's true size and crop, as SDXL was trained; "
        "bucket = the bucket's size and no crop, as in this project's original recipe",
    )


class SDXLCaptionSection(CaptionSection):
    """The captions: where they are from, the rules that change them, and how they are encoded."""

    dropout_to: Literal["empty", "zeros"] = Field(
        "empty",
        description="What a dropped caption becomes: empty = the encoded empty caption; zeros = embeddings of zeros, which "
        "diffusers and A1111 use without a negative prompt (force_zeros_for_empty_prompt in model_index.json)",
    )


class SDXLTraining(TrainingConfig):
    """A LoRA for Stable Diffusion XL."""

    model: SDXLModelSection
    data: SDXLDataSection
    captions: SDXLCaptionSection = Field(default_factory=SDXLCaptionSection)
    text_encoders: TwoTextEncoderSection = Field(default_factory=TwoTextEncoderSection)
