"""Memorised: how well an adapter's losses tell its training images from held-out ones.

It says that the adapter recognises its training images, not that it copies them, and is no part of a test result of "better".
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import numpy as np

from sushi_research.evaluation.outcomes import log_ratio


@dataclass(frozen=True)
class Memorised:
    """The AUC with its 95 % interval, and the gap: the mean log ratio of the held-out images minus that of the training images.

    An AUC of 0.5 does not tell them apart; 1 recognises every training image. `gap_se` is the gap's standard error, and
    `gap_degrees` are the degrees of freedom of its t distribution (Welch 1947); both are None with a single image on a side or
    without any variance.
    """

    auc: float
    low: float
    high: float
    gap: float
    gap_se: float | None
    gap_degrees: float | None


def image_means(loss: np.ndarray, base: np.ndarray) -> np.ndarray:
    """The mean log ratio of each image over its noise samples: [.., N, K] each -> [.., N]."""
    return log_ratio(loss, base).mean(axis=-1)


def memorised(trained: np.ndarray, held_out: np.ndarray) -> Memorised | None:
    """Compares the image means [M] of training images with those [N] of held-out images; None if a value is not finite."""
    if not (np.isfinite(trained).all() and np.isfinite(held_out).all()):
        return None
    found = auc(trained, held_out)
    low, high = auc_interval(found, len(trained), len(held_out))
    gap, error, degrees = _welch(held_out, trained)
    return Memorised(found, low, high, gap, error, degrees)


def auc(trained: np.ndarray, held_out: np.ndarray) -> float:
    """The fraction of pairs (training image, held-out image) in which the training image is lower; ties count half."""
    ordered = np.sort(held_out)
    above = len(ordered) - np.searchsorted(ordered, trained, side="right")
    equal = len(ordered) - above - np.searchsorted(ordered, trained, side="left")
    return float((above + equal / 2).sum() / (len(trained) * len(ordered)))


def auc_interval(found: float, trained: int, held_out: int, level: float = 0.95) -> tuple[float, float]:
    """The interval of an AUC over so many images on each side: method 5 of Newcombe 2006 (Statistics in Medicine 25, 559).

    The AUCs from which `found` is at most z standard errors away, with Hanley and McNeil's standard error for exponential
    distributions, and both of its sample sizes less one replaced by their mean.
    """
    z = statistics.NormalDist().inv_cdf((1 + level) / 2)
    mean_size = (trained + held_out) / 2 - 1

    def is_within(value: float) -> bool:
        spread = 1 + mean_size * ((1 - value) / (2 - value) + value / (1 + value))
        return (value - found) ** 2 <= z**2 * value * (1 - value) * spread / (trained * held_out)

    limits = []
    for outside in (0.0, 1.0):
        inside = found
        if is_within(outside):
            inside = outside
        for _ in range(60):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if is_within(middle) else (inside, middle)
        limits.append(inside)
    return limits[0], limits[1]


def summary(trained: tuple[np.ndarray, np.ndarray], held_out: tuple[np.ndarray, np.ndarray]) -> dict[str, float | None]:
    """The logged metrics, from (loss, base loss) [images, noise samples] of the training images and of the held-out ones."""
    found = memorised(image_means(*trained), image_means(*held_out))
    names = {"auc": "auc", "auc_low": "low", "auc_high": "high", "gap": "gap", "gap_se": "gap_se"}
    return {f"evaluation/memorised_{name}": getattr(found, field) if found else None for name, field in names.items()}


def _welch(one: np.ndarray, other: np.ndarray) -> tuple[float, float | None, float | None]:
    """(difference of the means, its standard error, degrees of freedom)."""
    difference = float(one.mean() - other.mean())
    if min(len(one), len(other)) < 2:
        return difference, None, None
    parts = [float(values.var(ddof=1)) / len(values) for values in (one, other)]
    if not sum(parts):
        return difference, None, None
    degrees = sum(parts) ** 2 / sum(
        part**2 / (len(values) - 1) for part, values in zip(parts, (one, other), strict=True)
    )
    return difference, sum(parts) ** 0.5, degrees
