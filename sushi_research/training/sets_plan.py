"""What a plan says of the sets of images: how often an epoch uses them, at which resolutions, and how they are cropped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sushi_research.config.sets import ResolvedSet
from sushi_research.data.buckets import distortion
from sushi_research.data.merged_sets import folder_names
from sushi_research.data.training_data import Data


@dataclass(frozen=True)
class SetPlan:
    """A set of images: `folder` tells it from the others, `uses` is the number of its items in an epoch.

    `crop` is the setting, with `crops` random crops of each image; `squeezed` is the largest change of an aspect ratio, as a
    fraction, with crop none. `enlarged` is the number of images that are upscaled. `masks` is the source of the masks, and
    `background` and `unmasked` are their settings.
    """

    folder: str
    path: str
    role: str
    images: int
    uses: int
    resolutions: tuple[int, ...]
    crop: str
    crops: int
    squeezed: float
    enlarged: int
    flip: float
    loss_weight: float
    target: str
    masks: str
    background: float
    unmasked: float

    def describe(self) -> str:
        """The set in one line of a plan."""
        often = "" if self.uses == self.images * len(self.resolutions) else f", {self.uses} per epoch"
        role = " (regularisation)" if self.role == "regularisation" else ""
        parts = [f"{self.images} image{'' if self.images == 1 else 's'}{often}"]
        parts += [f"at {' and '.join(map(str, self.resolutions))}"]
        parts += [f"{self.enlarged} enlarged"] if self.enlarged else []
        parts += {
            "random": [f"{self.crops} random crops each"],
            "box": ["the box of each"],
            "none": [f"squeezed by up to {self.squeezed:.1%}"],
        }.get(self.crop, [])
        parts += [f"mirrored {self.flip:g}"] if self.flip else []
        parts += [f"loss x {self.loss_weight:g}"] if self.loss_weight != 1 else []
        if self.masks != "none":
            parts += [f"masks: {self.masks}, background {self.background:g}"]
            parts += [f"without their masks in {100 * self.unmasked:g}% of the uses"] if self.unmasked else []
        parts += ["target: the base's prediction, a forward pass more"] if self.target == "base" else []
        return f"{self.folder}{role}: {', '.join(parts)}"


def sets_of_data(data: Data) -> tuple[SetPlan, ...]:
    """The sets of images that are trained on."""
    items, found = data.items, []
    number = items.samples.sets[items.rows]
    for each, folder in zip(data.sets, names_of(data.sets), strict=True):
        own = items if len(data.sets) == 1 else items.take(number == each.index)
        used = own.geometries
        by_width, by_height = used[:, 3] > used[:, 1], used[:, 2] > used[:, 0]
        found.append(
            SetPlan(
                folder=folder,
                path=each.path,
                role=each.role,
                images=_distinct(own.rows),
                uses=len(own),
                resolutions=each.resolutions,
                crop=each.crop,
                crops=each.crops if each.crop == "random" else 1,
                squeezed=round(float(distortion(used.astype(np.int64)).max(initial=0)), 4)
                if each.crop == "none"
                else 0.0,
                enlarged=_distinct(own.rows[by_width | by_height]),
                flip=each.flip,
                loss_weight=each.loss_weight,
                target=each.target,
                masks=each.masks.source,
                background=each.masks.background,
                unmasked=each.masks.unmasked,
            )
        )
    return tuple(found)


def names_of(sets: Sequence[ResolvedSet]) -> list[str]:
    """The name of each set in a plan: that of its folder, and its place in the config where several sets have the same one."""
    names = folder_names([each.path for each in sets])
    return [
        name if names.count(name) == 1 else f"{name} ({each.place})" for name, each in zip(names, sets, strict=True)
    ]


def _distinct(rows: np.ndarray) -> int:
    """How many different row numbers there are."""
    return int(np.count_nonzero(np.bincount(rows)))


def describe_sets(sets: tuple[SetPlan, ...]) -> list[str]:
    """The lines of a plan, if there is more to say than the other lines do."""
    if len(sets) == 1:
        [each] = sets
        if each.crop == "center" and each.masks == "none" and len(each.resolutions) == 1 and not each.enlarged:
            return []
    return [f"{'' if number else 'sets':<13}{each.describe()}" for number, each in enumerate(sets)]
