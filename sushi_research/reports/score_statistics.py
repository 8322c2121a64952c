"""Tests which of two variants has the lower score, by sign flips: the test of scores that are often equal in many units.

A judge's score, such as right or wrong, often differs by the same amount in nearly all units. The resamples of the bootstrap-t
(statistics.py) then hardly vary, some of them not at all, and its t has tails so long that it finds nothing, or is certain of
everything. Under the null hypothesis that two variants are exchangeable, the difference of each unit has either sign with equal
probability, whatever its size (Fisher 1935, The Design of Experiments, section 21), so random signs take the place of resamples:

- Units: with g_i the mean difference of unit i over runs, D the mean of all g_i and V_I = var(g) / N, each resample gives the g_i
  random signs, and T* is the mean of what results over its standard error.
- Seeds: normal random effects as in statistics.py, V_S with nu_S degrees of freedom.
- Both: D is compared with U* = sqrt(V_I) T* + sqrt(V_S) t*, as there. The p-value is the share of |U*| >= |D|. Without seed
  effects it is that of the sign-flip test, because T* grows with the mean alone, and for equal differences that of the sign test.

The 95 % interval holds the differences d for which the same test of the g_i - d has p > 0.05. docs/experiments.md has the simulated
level and power (testing/score_study.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from sushi_research import randomness
from sushi_research.reports import statistics
from sushi_research.reports.statistics import LEVEL, POWER, Difference, exact_mean, variance_of_mean

# Means that would be equal without rounding count as equal.
ROUNDING = 1e-9
# Halvings of the range in which an end of the interval is.
HALVINGS = 40


def sign_flip_difference(
    reference: np.ndarray, candidate: np.ndarray, *, same_seeds: bool = False, pairs: int = 1
) -> Difference:
    """Candidate minus reference of a score in the same units: [N, K] or [S, N, K] each, as `statistics.paired_difference`.

    `same_seeds`, `pairs`, the fields and the errors are as there. The interval need not be symmetric.

    Deterministic, independent of the order of units, and exactly antisymmetric in the two variants.
    """
    a, b = statistics.checked_units(reference, candidate, same_seeds=same_seeds, pairs=pairs)
    per_unit = b.mean(0) - a.mean(0)
    value, of_units = exact_mean(per_unit), variance_of_mean(per_unit)
    of_seeds, seed_degrees = statistics.seed_variance([b - a] if same_seeds else [a, b])
    # The resamples are those of one order of the two variants, whichever it is, so that the other order gives the same.
    ordered = np.sort(per_unit).tolist() >= np.sort(-per_unit).tolist() if value == 0 else value > 0
    flips = _Flips.of(per_unit if ordered else -per_unit, of_seeds, seed_degrees)
    low, high = flips.end(-1), flips.end(1)
    if value == 0:
        low, high = min(low, -high), max(high, -low)
    elif not ordered:
        low, high = -high, -low
    error = math.sqrt(of_units + of_seeds)
    degrees = statistics.satterthwaite([of_units, of_seeds], [len(per_unit) - 1, seed_degrees])
    around = np.sort(np.abs(flips.spread(flips.value)))
    half = float(around[statistics.RESAMPLES - int(LEVEL / pairs * (statistics.RESAMPLES + 1))])
    mean, unpaired = exact_mean(a.mean(0)), variance_of_mean(a.mean(0)) + variance_of_mean(b.mean(0))
    return Difference(
        value=value,
        relative=value / mean if mean else math.nan,
        low=low,
        high=high,
        p_value=flips.p_value(0.0),
        standard_error=error,
        degrees=degrees,
        smallest_detectable=half + statistics.t_quantile(POWER, degrees) * error,
        variance_reduction=unpaired / of_units if of_units else math.inf,
        images=len(per_unit),
        noise_samples=np.shape(reference)[-1],
        seeds=(len(a), len(b)),
        pairs=pairs,
    )


@dataclass(frozen=True)
class _Flips:
    """The resamples of `count` differences whose mean `value` is not negative, [RESAMPLES] each.

    `means`: the means of the differences with random signs, `signs` those of the signs; `of_seeds` the seed effects. `variance`: of
    the differences, with N in the denominator; 0 if they are equal.
    """

    count: int
    value: float
    variance: float
    means: np.ndarray
    signs: np.ndarray
    of_seeds: np.ndarray | float

    @classmethod
    def of(cls, differences: np.ndarray, of_seeds: float, seed_degrees: float) -> _Flips:
        """Equal differences are taken together: the number of positive signs among them is binomial."""
        n, resamples = len(differences), statistics.RESAMPLES
        rng = randomness.key(0, "signs of units", n)
        sums, signs = np.zeros(resamples), np.zeros(resamples)
        # In increasing order, so that the signs do not depend on the order of units.
        for value, count in zip(*np.unique(differences, return_counts=True), strict=True):
            of_value = 2.0 * rng.binomial(count, 0.5, size=resamples) - count
            sums += value * of_value
            signs += of_value
        value, variance = exact_mean(differences), (n - 1) * variance_of_mean(differences)
        variance = 0.0 if variance <= (ROUNDING * value) ** 2 else variance
        of_them = math.sqrt(of_seeds) * statistics.students_t(seed_degrees) if of_seeds > 0 else 0.0
        return cls(n, value, variance, sums / n, signs / n, of_them)

    def spread(self, d: float) -> np.ndarray:
        """U* [RESAMPLES] of the differences minus `d`; infinite where all flipped differences are equal, and not 0."""
        means = self.means - d * self.signs
        # sqrt(V_I) T* = mean sqrt(variance / variance of the flipped ones); the squares have the same sum before and after.
        flipped = self.variance + (self.value - d) ** 2 - means**2
        least = ROUNDING * (self.variance + (self.value - d) ** 2)
        with np.errstate(divide="ignore", invalid="ignore"):
            of_units = np.where(flipped > least, means * np.sqrt(self.variance / flipped), np.inf if least else 0.0)
        return of_units + self.of_seeds

    def p_value(self, d: float) -> float:
        """Of the null hypothesis that the difference is `d`; at least 2^(1 - N), which the most unlikely signs have."""
        reached = int(np.count_nonzero(np.abs(self.spread(d)) >= (1 - ROUNDING) * abs(self.value - d)))
        return max((1 + reached) / (statistics.RESAMPLES + 1), 2.0 ** (1 - self.count))

    def end(self, side: int) -> float:
        """The end of the 95 % interval below (-1) or above (1) the difference."""
        step = self.value or math.sqrt(self.variance)
        if not step:
            return self.value
        # The first place looked at on the lower side is 0, so 0 is outside the interval exactly if it is rejected.
        inside, outside = self.value, self.value + side * step
        while self.p_value(outside) > LEVEL:
            inside, outside = outside, outside + 2 * (outside - self.value)
            if not math.isfinite(outside):
                return side * math.inf
        for _ in range(HALVINGS):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if self.p_value(middle) > LEVEL else (inside, middle)
        # Where the p-value jumps at 0, as with scores of 0 and 1, rounding alone puts the end beside it.
        return 0.0 if self.p_value(0.0) > LEVEL and abs(inside) < 1e-6 * step else inside
