"""The sets of images of a config, with everything that a set does not give filled in from `data`, `captions` and `masks`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from pydantic import ValidationError

from sushi_research.config.data_set import Crop, DataSet
from sushi_research.config.inputs import DataSection
from sushi_research.config.mapping_list import keys_in, mistakes_of
from sushi_research.config.mistakes import MOST_PROBLEMS, unknown
from sushi_research.config.section import Section
from sushi_research.errors import UserError

# The top-level sections whose keys a set can give for itself, under the same name.
SECTIONS = ("captions", "masks")
# Settings that only one value of data.crop, or of masks.source, uses.
_OF_CROPS = (("crops", "random"), ("crop_column", "box"))
_OF_SOURCES = (("folder", "files"), ("column", "column"))


class _Config(Protocol):
    data: DataSection


@dataclass(frozen=True)
class ResolvedSet:
    """A set of images with all its settings. `place` is where they stand: "data", or "data.sets[1]".

    `captions` and `masks` are the top-level sections of these names with what the set gives itself; None without such a section.
    """

    index: int
    place: str
    path: str
    revision: str | None
    split: str
    image_column: str
    caption_column: str
    repeats: int | None
    weight: float | None
    resolutions: tuple[int, ...]
    upscale: bool
    crop: Crop
    crops: int
    crop_column: str
    flip: float
    role: Literal["train", "regularisation"]
    loss_weight: float
    target: Literal["image", "base"]
    captions: Any
    masks: Any

    def key(self, name: str) -> str:
        """The dotted name of a setting of this set, for messages: data.flip, or data.sets[1].flip."""
        return f"{self.place}.{name}"

    @property
    def is_regularisation(self) -> bool:
        return self.role == "regularisation"


def sets_of(config: _Config) -> tuple[ResolvedSet, ...]:
    """The sets of images of a training config: those of `data.sets`, or the one of `data.path`.

    Raises ValueError, with a sentence for each mistake, for settings of a set that do not fit together.
    """
    data = config.data
    if not data.sets:
        assert data.path is not None
        return (_resolved(config, 0, "data", DataSet(path=data.path)),)
    sets = tuple(_resolved(config, number, f"data.sets[{number}]", entry) for number, entry in enumerate(data.sets))
    _require_sensible(data, sets)
    _require_used(config, sets)
    return sets


def paths_of(config: _Config) -> str:
    """The paths of all sets, for messages."""
    return ", ".join(dict.fromkeys(each.path for each in sets_of(config)))


def _resolved(config: _Config, index: int, place: str, entry: DataSet) -> ResolvedSet:
    data, given = config.data, entry.model_fields_set
    inherited = (
        "revision",
        "split",
        "image_column",
        "caption_column",
        "upscale",
        "crop",
        "crops",
        "crop_column",
        "flip",
    )
    # null is a value of a set only where `data` has it too.
    values = {
        name: getattr(entry, name)
        if name in given and (name == "revision" or getattr(entry, name) is not None)
        else getattr(data, name)
        for name in inherited
    }
    own = {name: getattr(entry, name) for name in ("path", "repeats", "weight", "role", "loss_weight", "target")}
    return ResolvedSet(
        index=index,
        place=place,
        **own,
        **values,
        resolutions=tuple(sorted(set(entry.resolutions or data.resolutions or (data.resolution,)))),
        **{name: _section(config, name, place, getattr(entry, name)) for name in SECTIONS},
    )


def _section(config: _Config, name: str, place: str, given: dict[str, Any]) -> Section | None:
    """A top-level section with the keys that a set gives itself."""
    section: Section | None = getattr(config, name, None)
    if not given:
        return section
    place = f"{place}.{name}"
    keys = keys_in(type(section), place)
    problems = [unknown(f"{place}.{key}", "", keys, True) for key in given if f"{place}.{key}" not in keys.leaves]
    if not problems:
        try:
            return type(section).model_validate(section.model_dump() | given)
        except ValidationError as error:
            found = mistakes_of(error, place, keys, section.model_dump() | given)
            # The section's own checks say captions.trigger.
            problems = [re.sub(rf"(?<![\w.]){name}\.(?=\w)", lambda _: f"{place}.", each) for each in found]
    raise UserError(
        "; ".join(problems[:MOST_PROBLEMS])
    )  # pydantic takes no halves of surrogate pairs, which it escapes


def _require_sensible(data: DataSection, sets: Sequence[ResolvedSet]) -> None:
    """ValueError for settings of sets that have no effect, or do not fit together."""
    training = [each for each in sets if not each.is_regularisation]
    if not training:
        raise ValueError("data.sets has regularisation images only: add a set whose role is train")
    weighted = [each for each in training if each.weight is not None]
    for each, entry in zip(sets, data.sets, strict=True):
        if each.weight is not None and each.repeats is not None:
            raise ValueError(f"{each.key('weight')} and {each.key('repeats')} are both set: keep one of them")
        if each.weight is not None and len(weighted) < len(training):
            without = next(one for one in training if one.weight is None)
            raise ValueError(
                f"{each.key('weight')} is set, but {without.place} has no weight, and a ratio needs one of every set whose role "
                "is train: give all of them a weight, or repeats"
            )
        for name, crop in _OF_CROPS:
            if getattr(entry, name) is not None and each.crop != crop:
                raise ValueError(
                    f"{each.key(name)} has no effect while {each.key('crop')} is {each.crop}: set that to {crop}, or remove it"
                )
        for name, value in entry.masks.items():
            needed = {**dict(_OF_SOURCES), "source": each.masks.source}.get(name)
            used = each.masks.source == needed if needed else each.masks.source != "none"
            if value is not None and not used:
                raise ValueError(
                    f"{each.key('masks')}.{name} has no effect while {each.key('masks')}.source is {each.masks.source}: change "
                    f"that, or remove it"
                )


def _require_used(config: _Config, sets: Sequence[ResolvedSet]) -> None:
    """ValueError for a setting that all sets share, and that none of them uses."""
    crops = {each.crop for each in sets} | {config.data.crop}
    sources = {each.masks.source for each in sets if each.masks}
    of_crops = [(config.data, f"data.{name}", "crop", crop, crop in crops) for name, crop in _OF_CROPS]
    masks = getattr(config, "masks", None)
    of_masks = [(masks, f"masks.{name}", "masks.source", source, source in sources) for name, source in _OF_SOURCES] + [
        (masks, f"masks.{name}", "masks.source", "alpha, files or column", sources != {"none"})
        for name in ("background", "unmasked", "invert")
    ]
    for section, key, switch, value, used in of_crops + (of_masks if masks else []):
        name = key.rpartition(".")[2]
        if not used and getattr(section, name) != type(section).model_fields[name].default:
            raise ValueError(
                f"{key} has no effect while no set has the {switch} {value}: give one of them that, or remove it"
            )
