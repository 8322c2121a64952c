"""Config sections of a run's inputs: the base model, the images with captions, and the cache of encoded data."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from sushi_research.config.section import Location, Section, Side, Text

HUB = "folder in the diffusers format, .safetensors file, or hub id (owner/name, owner/name/file.safetensors)"
NULL_REVISION = "null = main; a commit hash pins the exact files"
TOKENIZERS = (
    "Folder or hub id with CLIP's vocabulary (vocab.json and merges.txt, as in any model in diffusers format); null = from the "
    "base model; for a single file, from the local hub cache or the hub"
)
PREDICTION = (
    "What the base model predicts; null = as the base declares (scheduler config, or the key v_pred of a single file), "
    "otherwise epsilon. A value that contradicts the base is an error"
)
ZERO_TERMINAL_SNR = (
    "Whether the base was trained with a zero-terminal-SNR schedule; null = as the base declares (scheduler config, or the "
    "key ztsnr of a single file)"
)


class ModelSection(Section):
    """The frozen base model."""

    base: Location = Field(description=f"Base model: {HUB}")
    revision: Text | None = Field(None, description=f"Branch, tag or commit of a hub id; {NULL_REVISION}")
    variant: Literal["fp16"] | None = Field(
        None, description="Load the repository's fp16 files, which halves the download"
    )
    vae: Location | None = Field(None, description=f"VAE to use instead of the base model's own: {HUB}")
    vae_revision: Text | None = Field(None, description="Branch, tag or commit of model.vae, like model.revision")
    text_encoders: Location | None = Field(
        None, description=f"Text encoders to use instead of the base model's own, or for a file that has none: {HUB}"
    )
    tokenizers: Location | None = Field(None, description=TOKENIZERS)
    prediction_type: Literal["epsilon", "v_prediction"] | None = Field(None, description=PREDICTION)
    zero_terminal_snr: bool | None = Field(None, description=ZERO_TERMINAL_SNR)


class DataSection(Section):
    """The training images and their captions."""

    path: Location = Field(
        description="Training images: a folder with captions next to them, an HF dataset folder, or a hub dataset id"
    )
    revision: Text | None = Field(None, description=f"Branch, tag or commit of a hub dataset; {NULL_REVISION}")
    split: Text = Field("train", description="Split of an HF dataset")
    image_column: Text = Field("image", description="Image column of an HF dataset")
    caption_column: Text = Field("text", description="Caption column of an HF dataset or a metadata.jsonl")
    resolution: Side = Field(description="Buckets have about this area: resolution x resolution pixels")
    bucket_step: int = Field(
        64, ge=8, le=1024, multiple_of=8, description="Bucket sides are multiples of this many pixels"
    )
    bucket_min_side: Side | None = Field(None, description="Shortest side of a bucket; null = resolution / 2")
    bucket_max_side: int | None = Field(
        None, ge=8, le=16384, description="Longest side of a bucket; null = resolution * 2"
    )
    upscale: bool = Field(False, description="Upscale images that are smaller than their bucket")
    flip: float = Field(0.0, ge=0, le=1, description="Probability of mirroring an image; each epoch samples again")
    on_bad_file: Literal["stop", "skip"] = Field(
        "stop",
        description="What to do about files that cannot be used (they are listed): stop before training, or skip them",
    )

    @model_validator(mode="after")
    def _sides_fit(self) -> DataSection:
        below = self.resolution // self.bucket_step * self.bucket_step
        if below != self.resolution:
            near = f"{below} or {below + self.bucket_step}" if below else f"{self.bucket_step}"
            raise ValueError(
                f"data.resolution is {self.resolution}, not a multiple of data.bucket_step, "
                f"which is {self.bucket_step}: choose {near}"
            )
        if self.bucket_min_side is not None and self.bucket_min_side > self.resolution:
            raise ValueError(
                f"data.bucket_min_side is {self.bucket_min_side}, above data.resolution, which is {self.resolution}"
            )
        if self.bucket_max_side is not None and self.bucket_max_side < self.resolution:
            raise ValueError(
                f"data.bucket_max_side is {self.bucket_max_side}, below data.resolution, which is {self.resolution}"
            )
        return self


class CacheSection(Section):
    """Where encoded images and captions are kept."""

    folder: Location = Field("cache", description="Cache folder; several runs can share it")
