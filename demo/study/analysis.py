"""How well a measure follows the scores: rank correlations, and the share of pairs of adapters that it puts in the right order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Scores are counts of 32 pictures. A pair counts if its scores are this far apart.
APART = 6
RESAMPLES = 2000


@dataclass(frozen=True)
class Agreement:
    """Spearman's correlation with the score and its 95 % interval over recipes; of `pairs` pairs, `right` are in the right order,
    with a 95 % interval of their share over recipes."""

    spearman: float
    spearman_low: float
    spearman_high: float
    right: float
    pairs: int
    share_low: float
    share_high: float

    @property
    def share(self) -> float:
        return self.right / self.pairs if self.pairs else float("nan")


def agreement(measure: Sequence[float], score: Sequence[float], recipes: Sequence[str]) -> Agreement:
    """Of a measure for which lower is better. Intervals are percentiles of a bootstrap that resamples whole recipes."""
    values, scores = np.asarray(measure, np.float64), np.asarray(score, np.float64)
    names = sorted(set(recipes))
    places = [np.flatnonzero(np.asarray(recipes) == name) for name in names]
    rng = np.random.default_rng(0)
    found = []
    for _ in range(RESAMPLES):
        chosen = np.concatenate([places[number] for number in rng.integers(len(names), size=len(names))])
        right, pairs = ordered(values[chosen], scores[chosen])
        found.append((spearman(values[chosen], scores[chosen]), right / pairs if pairs else np.nan))
    low, high = np.nanpercentile(np.array(found), [2.5, 97.5], axis=0)
    right, pairs = ordered(values, scores)
    return Agreement(spearman(values, scores), low[0], high[0], right, pairs, low[1], high[1])


def ordered(values: np.ndarray, scores: np.ndarray) -> tuple[float, int]:
    """(pairs in the right order, pairs) of those whose scores are `APART` or more apart; a tie of the measure is half right."""
    apart = scores[:, None] - scores[None, :] >= APART
    less, equal = values[:, None] < values[None, :], values[:, None] == values[None, :]
    return float((apart & less).sum() + 0.5 * (apart & equal).sum()), int(apart.sum())


def spearman(values: np.ndarray, scores: np.ndarray) -> float:
    """Spearman's rank correlation, with mean ranks for ties; NaN if one of the two is constant."""
    one, other = ranks(values), ranks(scores)
    if one.std() == 0 or other.std() == 0:
        return float("nan")
    return float(np.corrcoef(one, other)[0, 1])


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0, equal values with their mean rank."""
    return (values[:, None] > values[None, :]).sum(1) + ((values[:, None] == values[None, :]).sum(1) - 1) / 2
