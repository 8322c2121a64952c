"""One entry of `data.sets`: a set of images with settings of its own."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_serializer

from sushi_research.config.keys import Keys, keys_of, listed
from sushi_research.config.mistakes import MOST_PROBLEMS, Setting, sentence, unknown
from sushi_research.config.section import Bounded, Location, Section, Side, Text
from sushi_research.errors import UserError

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
    if not isinstance(value, list):
        return value
    found, problems = [], []
    for number, entry in enumerate(value):
        if isinstance(entry, DataSet):
            found.append(entry)
            continue
        place = f"data.sets[{number}]"
        if not isinstance(entry, dict):
            problems.append(f"{place} must be a mapping with a path and settings of its own")
            continue
        keys = keys_in(DataSet, place)
        problems += [
            unknown(f"{place}.{name}", "", keys, True) for name in entry if f"{place}.{name}" not in keys.leaves
        ]
        if "path" not in entry:
            problems.append(f"{place}.path is missing: add the folder of its images, or a hub id")
        known = {name: value for name, value in entry.items() if f"{place}.{name}" in keys.leaves}
        try:
            found.append(DataSet.model_validate({"path": "missing"} | known))
        except ValidationError as error:
            problems += mistakes_of(error, place, keys, known)
    if problems:
        raise UserError("; ".join(problems[:MOST_PROBLEMS]))
    return found


def keys_in(section: type[Section], place: str) -> Keys:
    """The keys of a section by their names at a place, such as `data.sets[1].flip`."""
    leaves = keys_of(section.model_json_schema()).leaves
    return Keys({f"{place}.{name}": leaf for name, leaf in leaves.items()}, {})


def mistakes_of(error: ValidationError, place: str, keys: Keys, given: dict[str, Any]) -> list[str]:
    """One sentence for each mistake in the values of a mapping at `place`, whose keys are those of `keys_in`."""
    settings = {f"{place}.{name}": Setting(value, "") for name, value in given.items()}
    for name, value in given.items():  # entries of a free-form mapping are settings of their own
        entries = value.items() if isinstance(value, dict) else ()
        settings |= {f"{place}.{name}.{key}": Setting(entry, "") for key, entry in entries}
    section, _, last = place.rpartition(".")
    first: dict[tuple[Any, ...], Any] = {}
    for each in error.errors():
        first.setdefault(each["loc"][:1], {**each, "loc": (section, last, *each["loc"])})
    return [sentence(each, keys, settings) for each in first.values()]
