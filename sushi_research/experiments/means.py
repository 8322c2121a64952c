"""The mean loss of a variant with its standard error, for tables and plots."""

from __future__ import annotations

import math

import numpy as np

from sushi_research.reports.statistics import clustered_mean


def mean_and_error(losses: np.ndarray) -> tuple[float, float]:
    """`clustered_mean` of [N, K] or [S, N, K]. The error is NaN for a single image or caption (N = 1): one says nothing about
    others."""
    if losses.shape[-2] == 1:
        return float(losses.mean(dtype=np.float64)), math.nan
    return clustered_mean(losses)


def mean_with_error(losses: np.ndarray, form: str) -> str:
    """Both as a text, the mean in the format `form`; without the error where it is not known."""
    mean, error = mean_and_error(losses)
    return f"{mean:{form}}" + (f" +- {error:.2g}" if math.isfinite(error) else "")
