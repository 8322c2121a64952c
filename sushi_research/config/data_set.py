"""One entry of `data.sets`: a set of images with settings of its own."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_serializer

from sushi_research.config.keys import listed
from sushi_research.config.mapping_list import read_mappings
from sushi_research.config.section import Bounded, Location, Section, Side, Text

NULL_REVISION = "null = main; a commit hash pins the exact files"
Crop = Literal["center", "random", "box", "none"]
Crops = Annotated[int, Field(ge=1, le=64)]
Resolutions = Annotated[list[Side], Field(min_length=1, max_length=8)]
CROP = (
    "How an image is fitted to its bucket: center = scaled to cover it, and cut evenly on both sides; random = cut at one of "
    "data.crops random places, another in each epoch; box = only the box in data.crop_column is used; none = squeezed to the "
    "bucket's shape, and nothing is cut"
)
CROPS = "How many random crops of an image are cached, with crop: random"
CROP_COLUMN = (
    "Column of an HF dataset or a metadata.jsonl with the box of each image, [left, top, right, bottom] in pixels"
)
RESOLUTIONS = (
    "Resolutions at which each image is used, once each per epoch; null = data.resolution alone. As with that, buckets have about "
    "this area"
)


# A mapping whose keys are all commented out in a file reads as null.
_Own = Annotated[dict[str, Any], BeforeValidator(lambda value: {} if value is None else value)]
_KEYS_OF_CAPTIONS, _KEYS_OF_MASKS = ("a mapping with keys of captions", "a mapping with keys of masks")


class DataSet(Section):
    """One set of images. What it does not give is that of `data`, `captions` and `masks`."""

    path: Location = Field(description="Images of the set: a folder, an HF dataset folder, or a hub dataset id")
    revision: Text | None = Field(None, description="As data.revision")
    split: Text | None = Field(None, description="As data.split")
    image_column: Text | None = Field(None, description="As data.image_column")
    caption_column: Text | None = Field(None, description="As data.caption_column")
    repeats: Annotated[int, Field(ge=1, le=999)] | None = Field(
        None,
        description="How often an epoch uses each image; the number in a folder's name is multiplied by it; null = 1",
    )
    weight: Annotated[float, Field(gt=0, le=1e6)] | None = Field(
        None, description="Instead of repeats: an epoch uses the sets in the ratio of their weights"
    )
    resolutions: Annotated[Resolutions, Bounded] | None = Field(None, description="As data.resolutions")
    upscale: bool | None = Field(None, description="As data.upscale")
    crop: Crop | None = Field(None, description="As data.crop")
    crops: Crops | None = Field(None, description="As data.crops")
    crop_column: Text | None = Field(None, description="As data.crop_column")
    flip: Annotated[float, Field(ge=0, le=1)] | None = Field(None, description="As data.flip")
    role: Literal["train", "regularisation"] = Field(
        "train",
        description="train = what is learned; regularisation = images of the class, which keep the base from forgetting: none is "
        "held out, and without repeats and weight all of them together are used as often as the training images",
    )
    loss_weight: Annotated[float, Field(gt=0, le=1000)] = Field(1.0, description="Factor of the loss of these images")
    target: Literal["image", "base"] = Field(
        "image",
        description="What is learned from the images: image = what they show; base = what the base predicts for them, so that "
        "nothing changes there (prior preservation)",
    )
    captions: _Own = Field({}, description="As captions, key by key", json_schema_extra={"allowed": _KEYS_OF_CAPTIONS})
    masks: _Own = Field({}, description="As masks, key by key", json_schema_extra={"allowed": _KEYS_OF_MASKS})

    @model_serializer
    def _given(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in type(self).model_fields if name in self.model_fields_set}


def schema_extra() -> dict[str, str]:
    """What --help and errors say of a list of sets."""
    settings = listed(name for name in DataSet.model_fields if name != "path")
    return {"allowed": f"a list of mappings with path and any of {settings}"}


def read_sets(value: Any) -> Any:
    """A validator of `data.sets`: mappings become `DataSet`. Raises UserError with one sentence per mistake; each names its key."""
    return read_mappings(value, "data.sets", DataSet, {"path": "add the folder of its images, or a hub id"})
