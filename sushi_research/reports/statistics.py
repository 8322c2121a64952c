"""Tests which of two variants has the lower validation loss: paired differences, their intervals, and test results.

All runs are evaluated on the same validation set of N images x K noise samples (timestep and noise), so losses are subtracted pair
by pair. Images are the independent units: the noise samples of an image are averaged first, and each image has the same weight. A
variant has S runs, which differ in their training seed. A loss array is [N, K] for one run or [S, N, K].

The procedure (docs/experiments.md has its measured coverage, and that of the alternatives):

- Images: the symmetric bootstrap-t (Hall 1988, J. R. Statist. Soc. B 50, 35), which resamples whole images (Cameron, Gelbach &
  Miller 2008, Rev. Econ. Stat. 90, 414). With g_i the difference of image i and D their mean, V_I = var(g) / N and
  T* = (D* - D) / sqrt(V_I*) over resamples.
- Seeds are normal random effects: V_S = s_A^2 / S_A + s_B^2 / S_B, from the runs' mean losses, with the degrees of freedom
  nu_S of Welch (1947, Biometrika 34, 28).
- Both: D is compared with U* = sqrt(V_I) T* + sqrt(V_S) t*, with t* from Student's t with nu_S degrees of freedom: the
  Behrens-Fisher solution (Robinson 1976, Ann. Statist. 4, 963) with the bootstrap's T* in place of one t. An interaction of
  images and seeds is counted in both V, which is conservative. Subtracting it once (two-way clustering), or Satterthwaite's t,
  gives false positives with many pairs, whose correction moves the level into the tails.
- Many pairs: Holm's correction (1979, Scand. J. Statist. 6, 65).

The interval is D -+ the 95 % quantile of |U*|. The p-value is the share of |U*| >= |D|, so 0 is outside the interval exactly if
p <= 0.05.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from sushi_research import randomness
from sushi_research.errors import UserError
from sushi_research.evaluation.results import MIN_IMAGES

LEVEL, POWER = 0.05, 0.8
# The smallest p-value is 1 / (RESAMPLES + 1). Times MAX_PAIRS that is LEVEL: with more pairs no difference could be significant.
RESAMPLES, MAX_PAIRS = 99_999, 5_000


@dataclass(frozen=True)
class Difference:
    """Mean loss of a candidate minus that of a reference; negative if the candidate is better.

    `relative` is divided by the reference's mean loss. `low`, `high` (95 % interval) and `p_value` are for this pair alone.
    `degrees`: Satterthwaite's degrees of freedom of `standard_error`. `smallest_detectable`: see `paired_difference`.
    `variance_reduction`: factor of images that would be needed for the same standard error over images if the two had been
    evaluated on different images. `seeds`: number of runs of the reference and of the candidate.
    """

    value: float
    relative: float
    low: float
    high: float
    p_value: float
    standard_error: float
    degrees: float
    smallest_detectable: float
    variance_reduction: float
    images: int
    noise_samples: int
    seeds: tuple[int, int]
    pairs: int

    @property
    def scope(self) -> str:
        """The population, beyond the images of the validation set, that the interval and test result apply to."""
        if self.seeds == (1, 1):
            return "these two runs, not other seeds"
        if 1 in self.seeds:
            return f"this one run of the {('reference', 'candidate')[self.seeds.index(1)]} and any seed of the other"
        return "both variants, any seed"


@dataclass(frozen=True)
class PairedTestResult:
    """`outcome`: "better", "worse" (the candidate, at a family-wise error of 5 %) or "not distinguishable"."""

    outcome: str
    adjusted_p: float
    difference: Difference

    def sentence(self, candidate: str, reference: str) -> str:
        """The test result as one line of text."""
        d = self.difference
        link = "from" if self.outcome == "not distinguishable" else "than"
        among = f" alone, {self.adjusted_p:.2g} among {d.pairs} pairs" if d.pairs > 1 else ""
        return (
            f"{candidate} is {self.outcome} {link} {reference}: loss {d.value:+.3g} ({d.relative:+.2%}), "
            f"95 % interval {d.low:+.3g} to {d.high:+.3g}, p = {d.p_value:.2g}{among}; "
            f"detectable from {d.smallest_detectable:.2g} on; "
            f"{d.images} images x {d.noise_samples} noise samples, {_runs(d.seeds[1])} against {d.seeds[0]}; it is about {d.scope}."
        )


def _runs(count: int) -> str:
    return "1 run" if count == 1 else f"{count} runs"


def clustered_mean(losses: np.ndarray) -> tuple[float, float]:
    """Mean of [N, K] and its standard error clustered by image, sqrt(var(image means) / N); runs of [S, N, K] are averaged.

    The clustered standard error of Miller (2024, arXiv 2411.00640), times sqrt(N / (N - 1)).
    """
    images = means_of_units(losses).mean(0)
    return exact_mean(images), math.sqrt(variance_of_mean(images))


def paired_difference(
    reference: np.ndarray, candidate: np.ndarray, *, same_seeds: bool = False, pairs: int = 1
) -> Difference:
    """Candidate minus reference on one validation set: [N, K] or [S, N, K] each; the numbers of runs S may differ.

    The result generalises to new images like those of the validation set, at the same timesteps. It generalises to new training
    seeds of a variant with two or more runs; for a variant with one run it is about that run (`Difference.scope`).

    `same_seeds`: run s of both variants was trained with the same seed, hence on the same samples and noise. Then the runs are
    subtracted before their variance is computed, which has S - 1 degrees of freedom instead of up to 2 (S - 1). The experiment's
    plan must decide this in advance, not which variance turns out smaller.

    `pairs`: number of comparisons in the family. `smallest_detectable` is the difference that Holm's first step, at level
    0.05 / pairs, finds with power 0.8: c + t(0.8, nu) SE, where c is the quantile of |U*| at that level (Bloom 1995, Evaluation
    Review 19, 547, with c for his critical t times SE), SE = sqrt(V_I + V_S), and nu is Satterthwaite's.

    Deterministic, independent of the order of images, and exactly antisymmetric in the two variants. UserError: shapes that do
    not match, losses that are not finite, fewer than 8 images, more than 5,000 pairs.
    """
    a, b = checked_units(reference, candidate, same_seeds=same_seeds, pairs=pairs)
    n = a.shape[1]
    per_image = b.mean(0) - a.mean(0)
    value = exact_mean(per_image)
    # Sorted and with a positive mean, so that resamples depend neither on the order of images nor on that of A and B.
    centred = np.sort(per_image if value >= 0 else -per_image) - abs(value)
    of_images = variance_of_mean(per_image)
    of_seeds, seed_degrees = seed_variance([b - a] if same_seeds else [a, b])

    spread = np.sqrt(of_images) * _resampled_t(centred)
    if of_seeds > 0:
        spread += np.sqrt(of_seeds) * students_t(seed_degrees)
    spread = np.sort(np.abs(spread))
    error = math.sqrt(of_images + of_seeds)
    degrees = satterthwaite([of_images, of_seeds], [n - 1, seed_degrees])
    half, family_half = (float(spread[RESAMPLES - int(level * (RESAMPLES + 1))]) for level in (LEVEL, LEVEL / pairs))
    reached = RESAMPLES - int(np.searchsorted(spread, abs(value), side="left"))
    mean, unpaired = exact_mean(a.mean(0)), variance_of_mean(a.mean(0)) + variance_of_mean(b.mean(0))
    return Difference(
        value=value,
        relative=value / mean if mean else math.nan,
        low=value - half,
        high=value + half,
        p_value=(1 + reached) / (RESAMPLES + 1),
        standard_error=error,
        degrees=degrees,
        smallest_detectable=family_half + t_quantile(POWER, degrees) * error,
        variance_reduction=unpaired / of_images if of_images else math.inf,
        images=n,
        noise_samples=np.shape(reference)[-1],
        seeds=(len(a), len(b)),
        pairs=pairs,
    )


def checked_units(
    reference: np.ndarray, candidate: np.ndarray, *, same_seeds: bool, pairs: int
) -> tuple[np.ndarray, np.ndarray]:
    """The arrays of `paired_difference` averaged over noise samples, [S, N] each; UserError for what cannot be compared."""
    a, b = means_of_units(reference), means_of_units(candidate)
    if np.shape(reference)[-2:] != np.shape(candidate)[-2:]:
        shapes = f"{np.shape(reference)} and {np.shape(candidate)}"
        raise UserError(f"Losses of shape {shapes} do not pair: evaluate both on the same validation set.")
    n = a.shape[1]
    if n < MIN_IMAGES:
        raise UserError(f"A comparison needs {MIN_IMAGES} held-out images or more, but the validation set has {n}.")
    if not 1 <= pairs <= MAX_PAIRS:
        raise UserError(f"{pairs} pairs cannot be tested, only between 1 and {MAX_PAIRS}: compare fewer variants.")
    if same_seeds and len(a) != len(b):
        raise UserError(f"Variants with {len(a)} and {len(b)} runs do not have the same seeds.")
    return a, b


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Adjusted p-values [m] of Holm (1979): rejecting those <= level keeps the family-wise error at the level.

    The j-th smallest becomes the largest of min(1, (m - i + 1) p_(i)) over i <= j. The tests may be dependent.
    """
    p = np.asarray(p_values, dtype=np.float64)
    order, adjusted = np.argsort(p, kind="stable"), np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(np.minimum(1.0, p[order] * np.arange(len(p), 0, -1)))
    return adjusted


def paired_test_results(differences: Sequence[Difference]) -> list[PairedTestResult]:
    """The test result of each pair of a family, with Holm's correction.

    UserError if a difference was computed for a family of another size.
    """
    for d in differences:
        if d.pairs != len(differences):
            raise UserError(
                f"A difference computed for {d.pairs} pairs is in a family of {len(differences)}: give all, with `pairs`."
            )
    return [
        PairedTestResult(("better" if d.value < 0 else "worse") if p <= LEVEL else "not distinguishable", float(p), d)
        for d, p in zip(differences, holm([d.p_value for d in differences]), strict=True)
    ]


def common_points(*runs: Sequence[float]) -> np.ndarray:
    """Points at which curves can be compared, [P]: all evaluation points (samples or seconds) within the range of every run."""
    low, high = max(min(points) for points in runs), min(max(points) for points in runs)
    if low > high:
        raise UserError(f"The curves do not overlap: one begins at {low:g}, another ends at {high:g}.")
    points = np.unique(np.concatenate([np.asarray(points, dtype=np.float64) for points in runs]))
    return points[(points >= low) & (points <= high)]


def interpolate(points: Sequence[float], losses: np.ndarray, at: Sequence[float]) -> np.ndarray:
    """Linear interpolation of losses [T, N, K], evaluated at increasing `points` [T], to [P, N, K] at `at` [P].

    The weights are the same for every image and noise sample, so pairs stay pairs: differences of interpolated losses are
    interpolated differences. A falling convex curve is below its chords, so interpolated losses tend to be too high. UserError
    for points that do not increase and for `at` outside them: nothing is extrapolated.
    """
    x, values, at = np.asarray(points, np.float64), np.asarray(losses, np.float64), np.asarray(at, np.float64)
    if x.shape != values.shape[:1] or not len(x) or not np.all(np.diff(x) > 0):
        raise UserError(f"A curve needs increasing points, one per evaluation: {len(x)} for losses of {values.shape}.")
    if len(at) and not (x[0] <= at.min() and at.max() <= x[-1]):
        raise UserError(f"A run evaluated from {x[0]:g} to {x[-1]:g} has no loss at {at.min():g} to {at.max():g}.")
    # At an evaluated point the weight of the earlier neighbour is exactly 0.
    right = np.searchsorted(x, at, side="left")
    left = np.maximum(right - 1, 0)
    share = ((at - x[left]) / np.where(right > left, x[right] - x[left], 1.0))[:, None, None]
    return (1 - share) * values[left] + share * values[right]


def t_quantile(p: float, degrees: float) -> float:
    """The quantile of Student's t at 0.5 <= p < 1, for real degrees >= 1, to six digits for p up to 0.999.

    With t = sqrt(nu) tan(angle) the density is proportional to cos(angle)^(nu - 1), integrated by the trapezoid rule.
    """
    # The grid ends at ten standard deviations of the angle, so that it stays fine for a large nu.
    angle = np.linspace(0.0, min(math.pi / 2, 10 / math.sqrt(degrees)), 10_001)
    density = np.cos(angle).clip(0) ** (degrees - 1)
    integral = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    return math.sqrt(degrees) * math.tan(np.interp(2 * p - 1, integral / integral[-1], angle))


def means_of_units(losses: np.ndarray) -> np.ndarray:
    """[N, K] or [S, N, K] -> means over noise samples, [S, N] float64."""
    # Contiguous, so that rounding does not depend on the memory layout of the caller's array.
    values = np.ascontiguousarray(losses, dtype=np.float64)
    if values.ndim not in (2, 3) or 0 in values.shape:
        raise UserError(
            f"Losses of shape {values.shape} are neither [images, noise samples] nor [seeds, images, noise samples]."
        )
    if not np.isfinite(values).all():
        raise UserError(
            f"{np.count_nonzero(~np.isfinite(values))} of {values.size} losses are not finite: the run diverged."
        )
    return values.mean(-1).reshape(-1, values.shape[-2])


def exact_mean(values: np.ndarray) -> float:
    """The mean of [N]; the sum is rounded exactly, hence independent of the order."""
    return math.fsum(values) / len(values)


def variance_of_mean(values: np.ndarray) -> float:
    """The estimated variance of the mean of independent values [N]."""
    return math.fsum((values - exact_mean(values)) ** 2) / (len(values) * (len(values) - 1))


def seed_variance(parts: Sequence[np.ndarray]) -> tuple[float, float]:
    """(variance of the mean over seeds, summed over parts [S, N]; its degrees of freedom). A part with one seed adds none."""
    several = [np.array([exact_mean(run) for run in part]) for part in parts if len(part) > 1]
    variances = [variance_of_mean(runs) for runs in several]
    return sum(variances), satterthwaite(variances, [len(runs) - 1 for runs in several])


def satterthwaite(variances: Sequence[float], degrees: Sequence[float]) -> float:
    """Degrees of freedom of a sum of independent variance estimates (Satterthwaite 1946, Biometrics 2, 110)."""
    total = sum(variances)
    return total**2 / sum(v**2 / nu for v, nu in zip(variances, degrees, strict=True)) if total else 1.0


@lru_cache(maxsize=2)
def _counts(images: int, resamples: int) -> np.ndarray:
    """Count of each image in each resample, [resamples, images] uint8: rows are multinomial with equal probabilities."""
    rng = randomness.key(0, "resampled images", images)
    # uint8 would overflow at 256; an image occurs that often in less than one of 10^500 resamples.
    return rng.multinomial(images, np.full(images, 1 / images), size=resamples).astype(np.uint8)


def _resampled_t(centred: np.ndarray) -> np.ndarray:
    """T* [RESAMPLES] of deviations [N]: a resample's mean over its standard error; infinite if it has one image only."""
    n = len(centred)
    if not centred.any():
        return np.zeros(RESAMPLES)
    # Scaled so that squares neither underflow nor overflow.
    values = centred / np.abs(centred).max()
    powers = np.stack([values, values**2], axis=1)
    counts = _counts(n, RESAMPLES)
    first, second = (np.concatenate([rows @ powers for rows in np.array_split(counts, 16)]) / n).T
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.nan_to_num(
            first / np.sqrt((second - first**2).clip(0) / (n - 1)), nan=0.0, posinf=np.inf, neginf=-np.inf
        )


def students_t(degrees: float) -> np.ndarray:
    """[RESAMPLES] samples of Student's t."""
    return randomness.key(0, "seed effects").standard_t(degrees, size=RESAMPLES)
