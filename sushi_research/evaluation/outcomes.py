"""The outcomes of training as log ratios of losses: what was learned, and whether what the base knew is kept.

The loss of an image and noise sample is divided by the base's on the same input, and the logarithm is averaged. So a noise sample
counts by how much the adapter changed it, whatever its size: with the mean squared error itself, the quarter of the timesteps with
the least noise makes up most of the mean.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sushi_research.evaluation.result_arrays import NUM_TIMESTEPS

# Timestep bins are quarters of the schedule, from 0 (least noise) to 3.
BINS = 4
# The bins that a test result on "learned" uses.
LEARNED_BINS: tuple[int, ...] = (3,)
# How much worse still counts as "not worse". The unit is log loss, for pictures the log distance from the held-out images and the
# mean squared difference of latents from the base's. In the study of measures (docs/examples/measure), of pairs of adapters of the
# concept they were chosen on, those within the margin differed by two or three of 32 scored pictures in the mean.
LEARNED_MARGIN, KEPT_MARGIN = 0.05, 0.2
PICTURES_LEARNED_MARGIN, PICTURES_KEPT_MARGIN = 0.05, 0.02
# Up to here the base's knowledge counts as whole when a step is chosen: in the same study, nearly every adapter of that concept
# below it kept 28 of 32 or more.
KEPT_LIMIT = 0.4
# In place of a loss of 0: two equal losses have a ratio of 1, and no logarithm is infinite.
FLOOR = float(np.finfo(np.float32).tiny)


def log_ratio(loss: np.ndarray, base: np.ndarray) -> np.ndarray:
    """log(loss / base), float64; below 0 the loss is lower than the base's. `base` broadcasts against `loss` [.., N, K].

    NaN for a loss that is not finite.
    """
    with np.errstate(invalid="ignore"):  # infinity minus infinity
        logs = [np.log(np.maximum(values.astype(np.float64), FLOOR)) for values in (loss, base)]
        ratio = logs[0] - logs[1]
    return np.where(np.isfinite(ratio), ratio, np.nan)


def in_bins(values: np.ndarray, timesteps: np.ndarray, bins: Sequence[int]) -> np.ndarray | None:
    """Those of `values` [.., N, K] whose timestep [N, K] is in one of the bins: [.., N, K'].

    None if one of the bins has no noise samples, or not the same number for each image.
    """
    bin_of = timesteps.astype(np.int64) * BINS // NUM_TIMESTEPS
    counts = [(bin_of == timestep_bin).sum(axis=1) for timestep_bin in bins]
    if any(count.min() == 0 or count.min() != count.max() for count in counts):
        return None
    chosen = values[..., np.isin(bin_of, bins)]
    return chosen.reshape(*values.shape[:-1], -1)


def learned(loss: np.ndarray, base: np.ndarray, timesteps: np.ndarray) -> np.ndarray | None:
    """The log ratios on the held-out images in LEARNED_BINS, [.., N, K']; lower is better. None if there are none."""
    return in_bins(log_ratio(loss, base), timesteps, LEARNED_BINS)


def learned_summary(loss: np.ndarray, base: np.ndarray, timesteps: np.ndarray) -> dict[str, float | None]:
    """The logged metrics of the held-out images, [N, K] each: `learned`, and the mean log ratio of each timestep bin."""
    found = {}
    names = {"evaluation/learned": LEARNED_BINS}
    names |= {f"evaluation/log_loss_over_base_by_timestep/{number}": (number,) for number in range(BINS)}
    for name, bins in names.items():
        values = in_bins(log_ratio(loss, base), timesteps, bins)
        found |= mean_with_error(name, values) if values is not None else {}
    return found


def ratio_summary(name: str, loss: np.ndarray, base: np.ndarray) -> dict[str, float | None]:
    """The logged metrics of another set, [N, K] each: the mean log ratio over all timesteps, 0 = as the base."""
    return mean_with_error(name, log_ratio(loss, base))


def mean_with_error(name: str, values: np.ndarray) -> dict[str, float | None]:
    """The mean over images of [N, noise samples], each the mean of its noise samples, and its standard error over images.

    Both are None if a value is not finite: without it, the mean would be one over other images and timesteps.
    """
    if not np.isfinite(values).all():
        return {name: None} | ({f"{name}_se": None} if len(values) > 1 else {})
    means = values.astype(np.float64).mean(axis=1)
    found: dict[str, float | None] = {name: float(means.mean())}
    if len(means) > 1:
        found[f"{name}_se"] = float(means.std(ddof=1) / len(means) ** 0.5)
    return found
