"""The adapters of the study of measures: which recipes are trained, on which concept and base, and after how many steps they are
measured. Fixed before the first result was seen."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from demo.concepts import PHOTOS

FOLDER = Path("runs/study")
FEW_PHOTOS = 4
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Setting:
    """A concept on a base. `changed` are settings of all its recipes; the steps are those at which adapters are measured.

    `changed` holds what the concept needs to be learned at all: `night` needs a noise offset. `nearest`: a picture counts as the
    concept if the nearest of all scenes is the one that was asked for, within the checker's limits or not.
    """

    name: str
    architecture: str
    concept: str
    steps: tuple[int, ...]
    changed: dict[str, Any] = field(default_factory=dict)
    nearest: bool = False

    @property
    def folder(self) -> Path:
        return FOLDER / self.name


SETTINGS = (
    Setting("star", "sdxl", "star", (60, 120, 240, 480)),
    Setting("unagi", "sdxl", "unagi", (80, 160, 320, 640)),
    # Three lengths and seven recipes are enough where a choice made on the first two is confirmed.
    # The style's colours are never exact enough for the checker's limits, with which every score is 0 (docs/demo.md).
    Setting("night", "sdxl", "night", (120, 240, 480), {"loss.noise_offset": 0.3}, nearest=True),
    Setting("star-sd15", "sd15", "star", (120, 240, 480)),
)


def recipes(setting: Setting) -> dict[str, dict[str, Any]]:
    """Name -> settings of each recipe. `photos` is what it is trained on: all, no-prior or few."""
    attention = setting.concept == "unagi"
    rate = 4e-3 if attention else 1.5e-3
    found: dict[str, dict[str, Any]] = {
        "plain": {},
        "rank-2": {"lora.rank": 2, "lora.alpha": 2.0},
        "slow": {"optimizer.lr": rate / 3},
        "fast": {"optimizer.lr": rate * 2.5},
        "other-layers": {"lora.targets": "kohya_conv", "optimizer.lr": 1.5e-3}
        if attention
        else {"lora.targets": "attention", "optimizer.lr": 4e-3},
        "other-loss": {"loss.snr_gamma": 5.0 if attention else None},
        "no-prior": {"photos": "no-prior"},
        "few": {"photos": "few"},
    }
    if setting.concept == "night":
        found["other-loss"] = {"loss.noise_offset": 0.0}
        del found["slow"]
    if setting.architecture == "sd15":
        del found["other-loss"]
    fixed = {"schedule.name": "constant_with_warmup", "schedule.warmup": 20}
    return {name: {**fixed, **setting.changed, **changed} for name, changed in found.items()}


def photos(setting: Setting, which: str) -> Path:
    """The folder of training images: the concept's photos with the prior images, without them, or four photos with them."""
    source = PHOTOS / setting.concept
    if which == "all":
        return source
    folder = setting.folder / f"photos-{which}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in sorted(source.iterdir()):
        if path.is_file() and (which == "no-prior" or int(path.name[:2]) < FEW_PHOTOS):
            shutil.copy(path, folder / path.name)
    if which == "few":
        shutil.copytree(source / "prior", folder / "prior")
    return folder
