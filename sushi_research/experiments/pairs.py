"""Pairs of variants: what of them can be compared, at which point, and the test of one outcome.

A pair is compared at the last point that both reached, in samples seen or in seconds of training (clocks.py), or at a step that the
user fixed beforehand. Runs of one seed count as one (seeds.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from sushi_research.errors import some
from sushi_research.evaluation.results import MIN_IMAGES
from sushi_research.experiments.clocks import clocks_of, wall_seconds_at
from sushi_research.experiments.run_ends import ends_at
from sushi_research.experiments.seeds import by_seed, per_seed, runs_that_count
from sushi_research.experiments.variants import Variant, variants_called
from sushi_research.reports import statistics
from sushi_research.reports.curve import Curve
from sushi_research.reports.outcome_tests import values_of
from sushi_research.reports.run_record import RunRecord
from sushi_research.reports.score_statistics import sign_flip_difference
from sushi_research.reports.statistics import MAX_PAIRS, Difference, PairedTestResult

# What the units of a kind of results are called, and the kind itself, in sentences.
CALLED = {
    "evaluation": ("evaluation", "held-out images"),
    "drift": ("drift", "captions"),
    "base_images": ("loss on the base's own pictures", "captions"),
    "prior": ("loss on prior images", "prior images"),
    "pictures_learned": ("pictures of held-out captions", "prompts"),
    "pictures_kept": ("pictures of neutral captions", "prompts"),
}
# What must be set for a kind of results that no run of a pair has.
NOT_MEASURED = {
    "base_images": ": older versions did not measure it, and an empty evaluation.drift_captions switches it off",
    "prior": ": it needs evaluation.prior_path",
    "pictures_learned": ": it needs evaluation.pictures",
    "pictures_kept": ": it needs evaluation.pictures",
}


@dataclass
class Pair:
    """One outcome of a candidate and a reference. `outcome` is a PairedTestResult, or None with the reason in `note`; `at` is the
    common point, or `step` the step that the user fixed; both None: the last evaluations.

    `values`, of which less is better, are those of the reference and of the candidate, [distinct seeds, N, K] each. `mean_losses`
    are their mean losses there, of arrays of `shape`. `is_score`: they are of a user's score, which has a test of its own;
    `is_negated`: of one of which more is better, so `values` and `outcome` have the opposite sign. At equal training time, `clock`
    is what measured it, and `wall_seconds` the wall-clock seconds of the two at that point.
    """

    candidate: Variant
    reference: Variant
    at: float | None = None
    step: int | None = None
    clock: str = ""
    wall_seconds: tuple[float, float] | None = None
    values: tuple[np.ndarray, np.ndarray] | None = None
    mean_losses: tuple[float, float] | None = None
    shape: tuple[int, ...] = ()
    same_seeds: bool = False
    note: str = ""
    outcome: PairedTestResult | None = None
    identical: bool = False
    is_negated: bool = False
    is_score: bool = False

    @property
    def difference(self) -> Difference | None:
        """The difference that was tested, of a score in its own sign; None if nothing was tested."""
        if self.outcome is None or not self.is_negated:
            return self.outcome and self.outcome.difference
        d = self.outcome.difference
        return replace(d, value=-d.value, low=-d.high, high=-d.low)

    @property
    def word(self) -> str:
        """ "lower" or "higher" (the candidate's value), "identical" or "not distinguishable"; the note if nothing was tested."""
        if self.outcome is None:
            return self.note
        words = {"better": "lower", "worse": "higher"}
        if self.is_negated:
            words = {"better": "higher", "worse": "lower"}
        return "identical" if self.identical else words.get(self.outcome.outcome, self.outcome.outcome)


@dataclass(frozen=True)
class Point:
    """Where runs are compared: at `step` if it is given, else at the common point `at` of the axis, else at the last one."""

    axis: str = "samples"
    at: float | None = None
    step: int | None = None


def pairs_of(variants: Sequence[Variant], reference: str | None) -> Iterator[tuple[Variant, Variant]]:
    """(candidate, reference): each variant with the named reference, or every later variant with every earlier one.

    If runs of the reference were trained with different code, each of their variants is a reference.
    """
    if reference is None:
        for earlier, later in itertools.combinations(variants, 2):
            yield later, earlier
        return
    chosen = variants_called(reference, variants)
    for number, each in enumerate(chosen):
        for variant in variants:
            if all(variant is not earlier for earlier in chosen[: number + 1]):
                yield variant, each


def with_tests(pairs: Sequence[Pair]) -> None:
    """Tests the pairs that have values, as one family: corrected for their number."""
    comparable = [pair for pair in pairs if pair.values is not None]
    count = len(comparable)
    if count > MAX_PAIRS:
        for pair in comparable:
            pair.values, pair.note = None, f"{count} tests are too many: name one variant with --reference"
        return
    differences: list[Difference] = []
    for pair in comparable:
        reference, candidate = pair.values
        test = sign_flip_difference if pair.is_score else statistics.paired_difference
        found = test(reference, candidate, same_seeds=pair.same_seeds, pairs=count)
        differences.append(found if pair.is_score else _not_too_sure(found))
    for pair, outcome in zip(comparable, statistics.paired_test_results(differences), strict=True):
        pair.outcome = outcome


def _not_too_sure(d: Difference) -> Difference:
    """The difference of losses or pictures; if it is the same for every unit, with the p-value of the sign test.

    Resamples of equal differences do not vary, which would make even eight of them certain.
    """
    is_constant = d.value != 0 and d.standard_error <= 1e-9 * abs(d.value)
    return replace(d, p_value=max(d.p_value, 2.0 ** (1 - d.images))) if is_constant else d


def compared(
    candidate: Variant,
    reference: Variant,
    kind: str,
    point: Point = Point(),  # noqa: B008
    values: Callable[[Curve], np.ndarray | None] | None = None,
) -> Pair:
    """The pair with its values of a kind of results at the point, interpolated between evaluations; nothing is tested yet.

    `values` [T, N, K] of a curve; by default those of the kind's outcome. None: a timestep bin has no noise samples.
    """
    pair = Pair(candidate, reference, same_seeds=_same_seeds(candidate, reference))
    pair.step = None if candidate.is_file and reference.is_file else point.step
    runs = runs_that_count(candidate.runs, reference.runs)
    curves = _comparable(pair, runs, kind)
    if curves is None:
        return pair
    of_curve = values or (lambda curve: values_of(kind, curve))
    found = [of_curve(curve) for curve in curves]
    if any(each is None for each in found):
        pair.note = "a timestep bin that it uses has no noise samples, or not the same number for each image"
        return pair
    at = _place(pair, runs, curves, kind, point)
    if pair.note:
        return pair
    if len({run.settings.get("model.base_storage", "compute") for run in runs}) > 1:
        # "Learned" and "kept" are relative to the base's loss, and a base in fewer bits has another one.
        pair.note = (
            "their bases are held in different ways (model.base_storage), and each was measured on its own: scripts/evaluate.py "
            "measures both on one base"
        )
        return pair
    by_path = {run.path: (curve, each) for run, curve, each in zip(runs, curves, found, strict=True)}

    def at_the_point(run: RunRecord, whole: np.ndarray) -> np.ndarray:
        curve = by_path[run.path][0]
        if at is None:
            is_step = point.step is not None and run.state != "file"
            return whole[curve.steps.index(point.step) if is_step else -1]
        return statistics.interpolate(curve.axis(point.axis), whole, [at])[0]

    sides = reference, candidate
    pair.values = tuple(per_seed(side.runs, lambda run: at_the_point(run, by_path[run.path][1])) for side in sides)
    losses = [per_seed(side.runs, lambda run: at_the_point(run, by_path[run.path][0].loss)) for side in sides]
    pair.mean_losses = tuple(float(each.mean()) for each in losses)
    pair.shape = losses[0].shape
    pair.identical = losses[0].shape == losses[1].shape and bool((losses[0] == losses[1]).all())
    if point.axis == "seconds":
        pair.clock = curves[0].times.clock
        pair.wall_seconds = tuple(wall_seconds_at(side.runs, at) for side in sides)
    return pair


def _place(pair: Pair, runs: Sequence[RunRecord], curves: Sequence[Curve], kind: str, point: Point) -> float | None:
    """The point of the axis at which the pair is compared; None: at the step, or at the last evaluations.

    If there is none, `pair.note` says why.
    """
    what, axis = CALLED[kind][0], point.axis
    has_file = pair.candidate.is_file or pair.reference.is_file
    if axis == "seconds" and has_file:
        pair.note = "an adapter file has no training time"
    elif point.step is not None:
        trained = [(run, curve) for run, curve in zip(runs, curves, strict=True) if run.state != "file"]
        if without := [run.name for run, curve in trained if point.step not in curve.steps]:
            pair.note = f"{some(without)} {_has(without)} no {what} at step {point.step}"
    elif has_file or kind == "drift":
        for run, curve in zip(runs, curves, strict=True):
            if run.evaluation is not None and run.evaluation.steps[-1] != curve.steps[-1]:
                pair.note = f"{run.name} has no {what} at its last evaluation, only at step {curve.steps[-1]}"
                return None
    elif axis == "seconds" and len(clocks := clocks_of(curves)) > 1:
        pair.note = f"their training times are by different clocks ({' and '.join(clocks)})"
    else:
        return _common(pair, [curve.axis(axis) for curve in curves], what, point)
    return None


def _common(pair: Pair, axes: Sequence[np.ndarray | None], what: str, point: Point) -> float | None:
    """The last point of the axis that all runs reach, or `point.at` if all reach it."""
    if any(points is None for points in axes):
        pair.note = f"the {point.axis} of a run are not recorded"
        return None
    if any((np.diff(points) <= 0).any() for points in axes):
        pair.note = f"the {point.axis} of a run do not increase from evaluation to evaluation"
        return None
    low, high = max(points[0] for points in axes), min(points[-1] for points in axes)
    at = high if point.at is None else point.at
    if point.at is not None and not low <= at <= high:
        pair.note = f"a run has no {what} around {at:g} {point.axis}, where the pair is compared"
    elif at <= 0 or at < low:
        pair.note = "they have no evaluated point in common after the first"
    else:
        pair.at = float(at)
        return pair.at
    return None


def _comparable(pair: Pair, runs: Sequence[RunRecord], kind: str) -> list[Curve] | None:
    """The curves of a kind if they can be compared; else None, with the reason in `pair.note`."""
    what, units = CALLED[kind]
    curves = [run.curves.get(kind) for run in runs]
    known = [curve for curve in curves if curve is not None]
    without = [run.name for run, curve in zip(runs, curves, strict=True) if curve is None]
    if without and kind in ("evaluation", "drift"):
        pair.note = f"a run has no {what}"
    elif without:
        pair.note = f"{some(without)} {_has(without)} no {what}" + ("" if known else NOT_MEASURED.get(kind, ""))
    elif len({curve.set_hash for curve in known}) > 1:
        pair.note = "they were measured on different validation sets"
        if kind != "evaluation":
            pair.note = f"their {what} {'are' if what.startswith('pictures') else 'is'} of different sets"
    elif len({curve.measured_on for curve in known}) > 1:
        pair.note = "their files differ in images, noise samples or timesteps, although they name one validation set"
    elif len(known[0].names) < MIN_IMAGES:
        # A run's images are held out; whether those of an evaluated file are is not always known.
        is_of_file = kind == "evaluation" and (pair.candidate.is_file or pair.reference.is_file)
        units = "images" if is_of_file else units
        pair.note = f"{len(known[0].names)} {units} are too few for a test result, which needs {MIN_IMAGES}"
    else:
        return known
    return None


def scored(candidate: Variant, reference: Variant, name: str, learned: Pair, step: int | None) -> Pair:
    """The pair with its values of a user's score, by the units that all runs have.

    Scores are of finished runs, so they count only where the pair is compared at the end of all its runs: `learned` has the pair's
    point.
    """
    pair = Pair(candidate, reference, at=learned.at, step=learned.step, same_seeds=learned.same_seeds, is_score=True)
    runs = runs_that_count(candidate.runs, reference.runs)
    if without := [run.name for run in runs if name not in run.scores]:
        pair.note = f"{some(without)} {_has(without)} no score {name}"
        return pair
    scores = {run.path: run.scores[name] for run in runs}
    if len({(score.about, score.higher_is_better) for score in scores.values()}) > 1:
        pair.note = f"their scores {name} differ in what is better or what they are about"
        return pair
    has_file = candidate.is_file or reference.is_file
    if any(run.state != "file" and not ends_at(run, learned.at, step, has_file) for run in runs):
        pair.note = f"score {name} is of the finished runs, which end at other points than the pair is compared at"
        return pair
    units = sorted(set.intersection(*(set(score.values) for score in scores.values())))
    if len(units) < MIN_IMAGES:
        count = f"{len(units)} unit{'' if len(units) == 1 else 's'}"
        pair.note = f"score {name} has {count} in common, and a test needs {MIN_IMAGES}: it is only a column"
        return pair
    pair.is_negated = scores[runs[0].path].higher_is_better
    sign = -1.0 if pair.is_negated else 1.0

    def of_run(run: RunRecord) -> np.ndarray:
        return sign * np.array([[scores[run.path].values[unit]] for unit in units], dtype=np.float64)

    pair.values = tuple(per_seed(side.runs, of_run) for side in (reference, candidate))
    return pair


def _has(names: Sequence[str]) -> str:
    return "has" if len(names) == 1 else "have"


def _same_seeds(candidate: Variant, reference: Variant) -> bool:
    """Whether both have the same two or more distinct seeds, so that seeds are paired. Does not depend on the results."""
    seeds = list(by_seed(candidate.runs))
    return len(seeds) > 1 and seeds == list(by_seed(reference.runs))


def removed_by_seeds(pair: Pair) -> float | None:
    """The share of the variance between runs that pairing by seed removed; None with fewer than two common seeds.

    1 - var(difference of runs with the same seed) / (var(reference's runs) + var(candidate's runs)). Negative if pairing added
    variance.
    """
    if not pair.same_seeds or pair.values is None:
        return None
    reference, candidate = (values.mean((1, 2)) for values in pair.values)
    unpaired = reference.var(ddof=1) + candidate.var(ddof=1)
    return float(1 - (candidate - reference).var(ddof=1) / unpaired) if unpaired > 0 else None
