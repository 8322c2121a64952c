"""Which evaluated step of a run is best, how sure that is, and from which step on the run only memorises.

Pure functions of what a run records, so anybody can compute them again from its files (`run_outcomes.read`). A step is chosen by a
sequential rule: the first evaluation after step 0 is the best so far, and a later one replaces it only if its criterion is lower by
more than one standard error of the paired difference. So ties go to the earlier step, and the choice up to a step does not depend
on later ones. The best of several steps on one validation set looks better than it is: it is for choosing a checkpoint, not for
comparing runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sushi_research.evaluation.outcomes import KEPT_LIMIT
from sushi_research.reports.statistics import t_quantile


@dataclass(frozen=True)
class StepOutcomes:
    """Mean log ratios (loss over the base's loss) of each unit at T steps, float64; NaN where a step was not measured.

    `learned` [T, N] is over the timestep bins that count, of N held-out images; `kept` [T, C] is of C images that the base drew,
    `prior` of prior images; `held_out` [T, N] and `trained` [T, M] are over all timesteps, of held-out and training images;
    `pictures_learned` and `pictures_kept` are of generated pictures. None for what is not measured.
    """

    steps: tuple[int, ...]
    learned: np.ndarray
    kept: np.ndarray | None = None
    prior: np.ndarray | None = None
    held_out: np.ndarray | None = None
    trained: np.ndarray | None = None
    pictures_learned: np.ndarray | None = None
    pictures_kept: np.ndarray | None = None


@dataclass(frozen=True)
class StepDifference:
    """The criterion at `step` minus that at `other`; negative if `step` is better.

    `standard_error` and the 95 % interval `low` to `high` are over images, noise samples fixed; NaN if there is one image only.
    They do not allow for the choice of the step.
    """

    step: int
    other: int
    value: float
    standard_error: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """Whether `step` is better by more than one standard error."""
        return self.value < -_or_zero(self.standard_error)


@dataclass(frozen=True)
class BestStep:
    """The best of the evaluated `steps`, and its difference from the first, the last and the best of the others.

    `unclear` are the other steps that are not worse by more than one standard error. `skipped` are the steps that cannot be chosen,
    because a value of them is missing or not finite.
    """

    step: int
    steps: tuple[int, ...]
    against_first: StepDifference | None
    against_last: StepDifference | None
    against_runner_up: StepDifference | None
    unclear: tuple[int, ...]
    skipped: tuple[int, ...]


def criterion(outcomes: StepOutcomes) -> list[np.ndarray]:
    """What decides between steps, lower is better: terms [T, units] whose means over their units add up.

    The mean of `learned`, plus what of the mean of `kept` is above KEPT_LIMIT. The study of measures (docs/examples/measure)
    compares it with other rules.
    """
    terms = [outcomes.learned]
    if outcomes.kept is not None:
        above = outcomes.kept - KEPT_LIMIT
        terms.append(np.where(above.mean(1, keepdims=True) > 0, above, 0 * above))  # 0 * NaN stays NaN
    return terms


def chosen_step(outcomes: StepOutcomes, until: int | None = None) -> int | None:
    """The best step by the sequential rule, of those up to `until` (default: all); None if there is none after step 0."""
    terms, best = criterion(outcomes), None
    for place in _candidates(outcomes.steps, terms):
        if until is not None and outcomes.steps[place] > until:
            break
        if best is None or _difference(outcomes.steps, terms, place, best).is_clear:
            best = place
    return None if best is None else outcomes.steps[best]


def best_step(outcomes: StepOutcomes) -> BestStep | None:
    """The best step and how sure it is; None if no step after 0 has finite values."""
    step = chosen_step(outcomes)
    if step is None:
        return None
    terms = criterion(outcomes)
    places = _candidates(outcomes.steps, terms)
    best = outcomes.steps.index(step)
    others = [place for place in places if place != best]

    def against(place: int) -> StepDifference | None:
        return None if place == best else _difference(outcomes.steps, terms, best, place)

    means = sum(term.mean(1) for term in terms)
    runner_up = min(others, key=lambda place: means[place], default=None)
    unclear = [place for place in others if not _difference(outcomes.steps, terms, best, place).is_clear]
    candidates = tuple(outcomes.steps[place] for place in places)
    return BestStep(
        step,
        candidates,
        against(places[0]),
        against(places[-1]),
        None if runner_up is None else against(runner_up),
        tuple(outcomes.steps[place] for place in unclear),
        tuple(each for each in outcomes.steps if each > 0 and each not in candidates),
    )


def memorises_from(outcomes: StepOutcomes) -> int | None:
    """The first evaluated step after which the run only memorises; None if there is none, or memorising is not measured.

    No later step has learned more by more than one standard error, while the gap between training and held-out images has grown by
    more than one until the last step.
    """
    if outcomes.held_out is None or outcomes.trained is None:
        return None
    rows = [outcomes.learned, outcomes.held_out, outcomes.trained]
    places = _candidates(outcomes.steps, rows)
    gap = [outcomes.held_out, -outcomes.trained]
    for number, place in enumerate(places[:-1]):
        improves = any(
            _difference(outcomes.steps, [outcomes.learned], later, place).is_clear for later in places[number + 1 :]
        )
        if not improves and _difference(outcomes.steps, gap, place, places[-1]).is_clear:
            return outcomes.steps[place]
    return None


def _candidates(steps: Sequence[int], terms: Sequence[np.ndarray]) -> list[int]:
    """The places of the steps after 0 whose values are all finite."""
    return [
        place for place, step in enumerate(steps) if step > 0 and all(np.isfinite(term[place]).all() for term in terms)
    ]


def _difference(steps: Sequence[int], terms: Sequence[np.ndarray], place: int, other: int) -> StepDifference:
    """The difference between two places of the sum of the terms' means; the terms' units are independent of each other."""
    value, variances, degrees = 0.0, [], []
    for term in terms:
        paired = term[place] - term[other]
        value += math.fsum(paired) / len(paired)
        variances.append(float(paired.var(ddof=1)) / len(paired) if len(paired) > 1 else math.nan)
        degrees.append(len(paired) - 1)
    total = sum(variances)
    half = 0.0 if total == 0 else math.nan
    if total > 0:  # Satterthwaite's degrees of freedom
        nu = total**2 / sum(each**2 / n for each, n in zip(variances, degrees, strict=True))
        half = t_quantile(0.975, max(nu, 1.0)) * math.sqrt(total)
    return StepDifference(steps[place], steps[other], value, math.sqrt(total), value - half, value + half)


def _or_zero(error: float) -> float:
    return 0.0 if math.isnan(error) else error
