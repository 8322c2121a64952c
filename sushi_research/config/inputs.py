"""Config sections of a run's inputs: the base model, the images with captions, and the cache of encoded data."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from sushi_research.config.data_set import (
    CROP,
    CROP_COLUMN,
    CROPS,
    NULL_REVISION,
    RESOLUTIONS,
    Crop,
    Crops,
    DataSet,
    Resolutions,
    read_sets,
    schema_extra,
)
from sushi_research.config.section import Bounded, Location, Section, Side, Text

HUB = "folder in the diffusers format, .safetensors file, or hub id (owner/name, owner/name/file.safetensors)"
TOKENIZERS = (
    "Folder or hub id with CLIP's vocabulary (vocab.json and merges.txt, as in any model in diffusers format); null = from the "
    "base model; for a single file, from the local hub cache or the hub"
)
PREDICTION = (
    "What the base model predicts; null = as the base declares (scheduler config, or the key v_pred or the metadata of a single "
    "file), otherwise epsilon. Files of rectified flows seldom say so. A value that contradicts the base is an error"
)
FLOW_SHIFT = (
    "Shift of the noise levels of a base that predicts a rectified flow, for training, evaluation and samples: above 1 more of "
    "them are near pure noise; null = that of the base's scheduler config, otherwise 1"
)
ZERO_TERMINAL_SNR = (
    "Whether the base was trained with a zero-terminal-SNR schedule; null = as the base declares (scheduler config, or the "
    "key ztsnr of a single file)"
)
BASE_STORAGE = (
    "How the UNet's weights are held: compute = in train.precision; int8, fp8 or nf4 = in 8 or 4 bits, made again in "
    "train.precision for each use. It saves memory, takes time, and changes what is learned (docs/small_base.md)"
)
# Beyond these nearly all noise levels are one.
SHIFTS = (0.01, 100)
FlowShift = Annotated[float, Field(ge=SHIFTS[0], le=SHIFTS[1])]
_PATH = "Training images: a folder with captions next to them, an HF dataset folder, or a hub dataset id"


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
    prediction_type: Literal["epsilon", "v_prediction", "rectified_flow"] | None = Field(None, description=PREDICTION)
    zero_terminal_snr: bool | None = Field(None, description=ZERO_TERMINAL_SNR)
    flow_shift: FlowShift | None = Field(None, description=FLOW_SHIFT)
    base_storage: Literal["compute", "int8", "fp8", "nf4"] = Field("compute", description=BASE_STORAGE)


class DataSection(Section):
    """The training images and their captions."""

    path: Location | None = Field(None, description=f"{_PATH}; null = those of data.sets")
    sets: Annotated[list[DataSet], BeforeValidator(read_sets), Bounded] = Field(
        [],
        description="Several sets of images, each with a path and settings of its own, instead of data.path. What a set does not "
        "give is that of data, captions and masks (docs/data.md)",
        json_schema_extra=schema_extra(),
    )
    revision: Text | None = Field(None, description=f"Branch, tag or commit of a hub dataset; {NULL_REVISION}")
    split: Text = Field("train", description="Split of an HF dataset")
    image_column: Text = Field("image", description="Image column of an HF dataset")
    caption_column: Text = Field("text", description="Caption column of an HF dataset or a metadata.jsonl")
    resolution: Side = Field(description="Buckets have about this area: resolution x resolution pixels")
    resolutions: Annotated[Resolutions, Bounded] | None = Field(None, description=RESOLUTIONS)
    bucket_step: int = Field(
        64, ge=8, le=1024, multiple_of=8, description="Bucket sides are multiples of this many pixels"
    )
    bucket_min_side: Side | None = Field(None, description="Shortest side of a bucket; null = resolution / 2")
    bucket_max_side: int | None = Field(
        None, ge=8, le=16384, description="Longest side of a bucket; null = resolution * 2"
    )
    upscale: bool = Field(False, description="Upscale images that are smaller than their bucket")
    crop: Crop = Field("center", description=CROP)
    crops: Crops = Field(4, description=CROPS)
    crop_column: Text = Field("crop", description=f"{CROP_COLUMN}, with crop: box")
    flip: float = Field(0.0, ge=0, le=1, description="Probability of mirroring an image; each epoch samples again")
    on_bad_file: Literal["stop", "skip"] = Field(
        "stop",
        description="What to do about files that cannot be used (they are listed): stop before training, or skip them",
    )

    @model_validator(mode="after")
    def _sides_fit(self) -> DataSection:
        self._require_fitting("data.resolution", self.resolution)
        for number, side in enumerate(self.resolutions or []):
            self._require_fitting(f"data.resolutions[{number}]", side)
        for number, entry in enumerate(self.sets):
            for place, side in enumerate(entry.resolutions or []):
                self._require_fitting(f"data.sets[{number}].resolutions[{place}]", side)
        return self

    def _require_fitting(self, key: str, resolution: int) -> None:
        """ValueError unless buckets of this resolution are possible."""
        below = resolution // self.bucket_step * self.bucket_step
        if below != resolution:
            near = f"{below} or {below + self.bucket_step}" if below else f"{self.bucket_step}"
            raise ValueError(
                f"{key} is {resolution}, not a multiple of data.bucket_step, which is {self.bucket_step}: choose {near}"
            )
        if self.bucket_min_side is not None and self.bucket_min_side > resolution:
            raise ValueError(f"data.bucket_min_side is {self.bucket_min_side}, above {key}, which is {resolution}")
        if self.bucket_max_side is not None and self.bucket_max_side < resolution:
            raise ValueError(f"data.bucket_max_side is {self.bucket_max_side}, below {key}, which is {resolution}")

    @model_validator(mode="after")
    def _one_source(self) -> DataSection:
        if self.path is not None and self.sets:
            raise ValueError("data.path and data.sets are both set: keep one of them")
        if self.path is None and not self.sets:
            raise ValueError(f"data.path is missing: give --data.path VALUE, or path under data: in a file ({_PATH})")
        return self


class CacheSection(Section):
    """Where encoded images and captions are kept."""

    folder: Location = Field("cache", description="Cache folder; several runs can share it")
