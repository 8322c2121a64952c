"""The measures that the study compares. Every one was named before any result was seen.

`learned` should follow how many of 32 pictures show the concept, `kept` how many of 32 show what the base knew. Lower is meant to
be better for each. `mse` is the trainers' usual validation loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from sushi_research.evaluation.memorisation import auc

Arrays = Mapping[str, np.ndarray]
NUM_TIMESTEPS = 1000


def log_ratio(arrays: Arrays, name: str, low: int = 0, high: int = NUM_TIMESTEPS) -> np.ndarray:
    """The mean over timesteps from `low` to below `high` of log(loss / the base's loss), for each image [N]."""
    ratio = np.log(arrays[f"loss/{name}"].astype(np.float64) / arrays[f"base_loss/{name}"])
    times = arrays[f"times/{name}"]
    return np.nanmean(np.where((times >= low) & (times < high), ratio, np.nan), axis=1)


def pooled(latents: np.ndarray, side: int) -> np.ndarray:
    """Means of `side` x `side` cells of latents [N, 4, h, w], as float64."""
    n, channels, h, w = latents.shape
    return latents.astype(np.float64).reshape(n, channels, h // side, side, w // side, side).mean((3, 5))


def distance(pictures: np.ndarray, references: np.ndarray, side: int = 1) -> np.ndarray:
    """The mean squared difference of each picture's latents from its reference's, [N]."""
    return np.square(pooled(pictures, side) - pooled(references, side)).mean((1, 2, 3))


def from_base(kind: str, side: int = 1) -> Callable[[Arrays, Arrays], np.ndarray]:
    """The distance of an adapter's pictures from the base's own, of the same prompts and seeds."""
    return lambda arrays, base: distance(arrays[f"pictures/{kind}"], base[f"pictures/{kind}"], side)


def from_images(side: int = 1) -> Callable[[Arrays, Arrays], np.ndarray]:
    """log(distance of the adapter's pictures from the held-out images of their prompts / that of the base's pictures)."""

    def measure(arrays: Arrays, base: Arrays) -> np.ndarray:
        mine, its = (distance(each["pictures/concept"], each["reference"], side) for each in (arrays, base))
        return np.log(mine / its)

    return measure


# Each takes the arrays of an adapter and those of the base, and gives a value for each image or prompt, [N].
LEARNED: dict[str, Callable[[Arrays, Arrays], np.ndarray]] = {
    "mse": lambda arrays, base: arrays["loss/held_out"].astype(np.float64).mean(1),
    "log, all timesteps": lambda arrays, base: log_ratio(arrays, "held_out"),
    "log, t < 250": lambda arrays, base: log_ratio(arrays, "held_out", 0, 250),
    "log, t 250 to 499": lambda arrays, base: log_ratio(arrays, "held_out", 250, 500),
    "log, t 500 to 749": lambda arrays, base: log_ratio(arrays, "held_out", 500, 750),
    "log, t >= 750": lambda arrays, base: log_ratio(arrays, "held_out", 750),
    "log, t >= 500": lambda arrays, base: log_ratio(arrays, "held_out", 500),
    "log, t >= 875": lambda arrays, base: log_ratio(arrays, "held_out", 875),
    "pictures, distance from the held-out images": from_images(),
    "the same, means of 2 x 2": from_images(2),
    "the same, means of 4 x 4": from_images(4),
}
KEPT: dict[str, Callable[[Arrays, Arrays], np.ndarray]] = {
    "held-out mse": LEARNED["mse"],
    "drift": lambda arrays, base: arrays["drift"].astype(np.float64).mean(1),
    "drift, log": lambda arrays, base: np.log(arrays["drift"].astype(np.float64) + 1e-12).mean(1),
    "log, the base's images": lambda arrays, base: log_ratio(arrays, "own"),
    "log, the base's images, t < 250": lambda arrays, base: log_ratio(arrays, "own", 0, 250),
    "log, the base's images, t >= 500": lambda arrays, base: log_ratio(arrays, "own", 500),
    "log, the base's images, t >= 750": lambda arrays, base: log_ratio(arrays, "own", 750),
    "log, prior images": lambda arrays, base: log_ratio(arrays, "prior"),
    "log, prior images, t >= 500": lambda arrays, base: log_ratio(arrays, "prior", 500),
    "log, prior images, t >= 750": lambda arrays, base: log_ratio(arrays, "prior", 750),
    "pictures, distance from the base's": from_base("neutral"),
    "the same, means of 2 x 2": from_base("neutral", 2),
    "the same, means of 4 x 4": from_base("neutral", 4),
}


def memorised(arrays: Arrays) -> float:
    """How often a photo that was trained on has a lower mean log ratio than a held-out image (AUC: 0.5 = not distinguished)."""
    return auc(log_ratio(arrays, "photos"), log_ratio(arrays, "held_out"))


# What the product uses (sushi_research/evaluation/outcomes.py and pictures.py), first the losses.
IN_USE = {
    "learned": ["log, t >= 750", "pictures, distance from the held-out images"],
    "kept": ["drift", "log, the base's images", "log, prior images", "pictures, distance from the base's"],
}
