"""Compares runs: groups them into variants, finds the settings that differ, and tests each pair.

A pair of variants (variants.py) is compared at the last point that both reached in samples seen, or at a step fixed beforehand
(pairs.py). All outcomes of all pairs there are one family of tests, and each pair has one result (reports/outcome_tests.py). What
was learned at equal training time, and the drift, are families of their own. The statistics are in reports/statistics.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sushi_research.errors import UserError, some
from sushi_research.evaluation.outcomes import LEARNED_BINS, in_bins, log_ratio
from sushi_research.experiments import code_variants, repetitions, step_paths
from sushi_research.experiments.evaluated_files import notes_on_files, with_distinct_names, without_chosen
from sushi_research.experiments.pairs import Pair, Point, compared, pairs_of, scored, with_tests
from sushi_research.experiments.run_ends import last_common
from sushi_research.experiments.seeds import notes_on_seeds, runs_that_count
from sushi_research.experiments.variants import SEED, Variant, variants_of
from sushi_research.reports import statistics
from sushi_research.reports.curve import Curve
from sushi_research.reports.outcome_tests import (
    BINS,
    OUTCOMES,
    Outcome,
    OutcomeTest,
    PairResult,
    of_score,
    pair_result,
)
from sushi_research.reports.run_record import RunRecord
from sushi_research.reports.statistics import Difference

# Before the name of a user's score among the kinds of results.
SCORE = "score "
# Settings of evaluations, which do not change what is learned. Whether the images of a path are trained on, facts.data says.
EVALUATION = ("path", "split", "every", "noise_samples", "drift_captions", "prior_path", "pictures", "keep_best")
# Settings of locations and output, which do not distinguish variants.
PLACES = ("run.", "cache.", "tracking.", "sample.", "checkpoint.", "dry_run", "adapters", "lora_scales", "output")
PLACES += tuple(f"evaluation.{key}" for key in EVALUATION)


@dataclass
class Comparison:
    """The contents of the comparison page. `by_run`: all runs belong to one variant and are compared one by one.

    `outcomes`: by kind of results (or "score " and its name) the pairs with their tests, at one point for all outcomes of a pair;
    `bins` and `results` are of the same pairs in the same order. `step`: the step that the user fixed. `seconds`: what was learned
    at equal training time.
    """

    variants: list[Variant]
    by_run: bool
    differing: dict[str, list[Any]]
    outcomes: dict[str, list[Pair]] = field(default_factory=dict)
    bins: list[list[Difference | None]] = field(default_factory=list)
    results: list[PairResult | None] = field(default_factory=list)
    seconds: list[Pair] = field(default_factory=list)
    drift: list[Pair] = field(default_factory=list)
    step: int | None = None
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def learned(self) -> list[Pair]:
        """The pairs with the test of what they learned, by the losses on the held-out images."""
        return self.outcomes["evaluation"]

    @property
    def decided(self) -> list[tuple[Pair, PairResult]]:
        """The pairs that have a result, with it."""
        return [(pair, result) for pair, result in zip(self.learned, self.results, strict=True) if result is not None]


def compare(
    records: Sequence[RunRecord], reference: str | None = None, pool_code: bool = False, step: int | None = None
) -> Comparison:
    """Compares runs. UserError if there are none, if no variant is called `reference`, or if no run was evaluated at `step`.

    `pool_code`: runs of one variant may have been trained with different code. `step`: compare at the evaluation of this step, not
    at the last common point.
    """
    if not records:
        raise UserError("there is no run to compare: give the folders of two runs or more.")
    records, excluded = without_chosen(records)
    if not records:
        raise UserError(f"there is no run to compare: {excluded[0]}.")
    records = with_distinct_names([record.with_sorted_names() for record in records])
    variants, by_run = variants_of(records, pool_code)
    pairs = list(pairs_of(variants, reference))
    found = Comparison(variants, by_run, differing(variants), step=step)
    found.problems = [problem for record in records for problem in record.problems]
    found.problems += _without_step(records, step)
    compared_outcomes(found, pairs, step)
    if step is None:
        found.seconds = [compared(*pair, "evaluation", Point("seconds")) for pair in pairs]
        with_tests(found.seconds)
    found.drift = [compared(*pair, "drift", Point(step=step)) for pair in pairs]
    with_tests(found.drift)
    found.warnings = [*warnings_of(records), *code_variants.warnings(records, pool_code)]
    found.warnings += [*repetitions.warnings(records), *excluded, *notes_on_files(records)]
    found.warnings += [note for variant in variants for note in notes_on_seeds(variant.runs, variant.label)]
    return found


def _without_step(records: Sequence[RunRecord], step: int | None) -> list[str]:
    """A sentence that names the runs that were not evaluated at the step. UserError if no run was."""
    trained = [run for run in records if run.state != "file" and run.evaluation is not None]
    without = [run for run in trained if step is not None and step not in run.evaluation.steps]
    if not without:
        return []
    if len(without) == len(trained):
        steps = some([str(known) for known in sorted({known for run in trained for known in run.evaluation.steps})])
        raise UserError(f"--step is {step}, and no run was evaluated at that step: choose from {steps}.")
    return [f"not evaluated at step {step}, so without a test result: {some([run.name for run in without])}"]


def differing(variants: Sequence[Variant]) -> dict[str, list[Any]]:
    """Settings and facts that differ between trained variants -> each variant's value, including the seeds.

    The value is None if the variant does not have the key, and "" for an adapter file, whose training settings are unknown.
    """
    shown = [{**variant.runs[0].settings, **variant.runs[0].identity} for variant in variants]
    for each, variant in zip(shown, variants, strict=True):
        each[SEED] = ", ".join(str(seed) for seed in variant.seeds)
    trained = [each for each, variant in zip(shown, variants, strict=True) if not variant.is_file]
    keys = sorted({key for each in trained for key in each if not key.startswith(PLACES)})
    found = {
        key: ["" if variant.is_file else each.get(key) for each, variant in zip(shown, variants, strict=True)]
        for key in keys
        if any(each.get(key) != trained[0].get(key) for each in trained)
    }
    runs, is_file = [v.runs for v in variants], [v.is_file for v in variants]
    return found | step_paths.differing(runs, is_file) | code_variants.differing(runs, is_file)


def warnings_of(records: Sequence[RunRecord]) -> list[str]:
    """Warnings about differences that limit the comparability of the runs, one sentence each."""
    found: list[str] = []
    timing, rounding = "their training times are not comparable", "rounding may differ"
    checks: list[tuple[str, Callable[[RunRecord], Any], str]] = [
        (
            "validation set",
            lambda r: r.evaluation and r.evaluation.set_hash,
            "no test between them of what was learned",
        ),
        (
            "base",
            lambda r: (r.entry.get("base") or {}).get("unet"),
            "what was learned and kept is over the own base of each",
        ),
        ("precision", lambda r: r.entry.get("precision"), "rounding differs"),
        ("random scheme", lambda r: r.entry.get("random_scheme"), "their noise differs"),
        ("device", lambda r: r.entry.get("device"), timing),
        (step_paths.KEY, lambda r: step_paths.label(r) if r.entries else None, f"{rounding}, and {timing}"),
        ("number of processes", lambda r: r.entry.get("world"), timing),
    ]
    for library in ("torch", "diffusers", "peft", "bitsandbytes"):
        checks.append((library, lambda r, of=library: (r.entry.get("libraries") or {}).get(of), rounding))
    for what, value, consequence in checks:
        _warn(found, records, what, value, consequence)
    return found


def _warn(
    found: list[str], records: Sequence[RunRecord], what: str, value: Callable[[RunRecord], Any], consequence: str
) -> None:
    groups: dict[str, list[str]] = {}
    for record in records:
        if (known := value(record)) is not None:
            groups.setdefault(str(known), []).append(record.name)
    if len(groups) > 1:
        values = "; ".join(f"{known[:12]}: {some(names)}" for known, names in groups.items())
        found.append(f"not all runs have the same {what} ({values}): {consequence}")


def _outcome(kind: str, variants: Sequence[Variant]) -> Outcome:
    """The outcome of a kind of results, or of a user's score."""
    if kind in OUTCOMES:
        return OUTCOMES[kind]
    name = kind.removeprefix(SCORE)
    scores = [run.scores[name] for variant in variants for run in variant.runs if name in run.scores]
    about = {score.about for score in scores}
    return of_score(name, about.pop() if len(about) == 1 else None, scores[0].higher_is_better)


def compared_outcomes(comparison: Comparison, pairs: Sequence[tuple[Variant, Variant]], step: int | None) -> None:
    """Tests every outcome of every pair at its one point, as one family, and gives each pair its result."""
    scores = sorted({name for variant in comparison.variants for run in variant.runs for name in run.scores})
    measured = {kind for variant in comparison.variants for run in variant.runs for kind in run.curves}
    kinds = ["evaluation", "base_images", *(kind for kind in OUTCOMES if kind in measured)]
    families: dict[str, list[Pair]] = {kind: [] for kind in dict.fromkeys(kinds)}
    families |= {SCORE + name: [] for name in scores}
    for candidate, reference in pairs:
        learned = compared(candidate, reference, "evaluation", Point(step=step))
        if learned.values is None:  # the point is that of all losses, even where no test of "learned" is possible
            whole = compared(candidate, reference, "evaluation", Point(step=step), values=lambda curve: curve.loss)
            learned.at, learned.mean_losses = whole.at, whole.mean_losses
            if learned.at is None and step is None and not (candidate.is_file or reference.is_file):
                learned.at = last_common(runs_that_count(candidate.runs, reference.runs))
        families["evaluation"].append(learned)
        point = Point(at=learned.at, step=step)
        for kind in families:
            if kind in OUTCOMES and kind != "evaluation":
                families[kind].append(compared(candidate, reference, kind, point))
            elif kind.startswith(SCORE):
                families[kind].append(scored(candidate, reference, kind.removeprefix(SCORE), learned, step))
    with_tests([pair for family in families.values() for pair in family])
    comparison.outcomes = families
    comparison.bins = [_bins(pair, step) for pair in families["evaluation"]]
    for number, pair in enumerate(families["evaluation"]):
        of_pair = {kind: family[number] for kind, family in families.items()}
        comparison.results.append(_result(pair, of_pair, comparison.bins[number]))


def _bins(pair: Pair, step: int | None) -> list[Difference | None]:
    """The difference of a pair in each timestep bin, each with its own interval; None without noise samples."""
    found: list[Difference | None] = []
    for number in BINS if pair.outcome is not None else ():
        if (number,) == LEARNED_BINS:
            found.append(pair.outcome.difference)  # the same, and the interval does not depend on the number of pairs
            continue

        def of_bin(curve: Curve, number: int = number) -> np.ndarray | None:
            return in_bins(log_ratio(curve.loss, curve.base), curve.timesteps, (number,))

        values = compared(pair.candidate, pair.reference, "evaluation", Point(step=step), of_bin).values
        found.append(values and statistics.paired_difference(*values, same_seeds=pair.same_seeds))
    return found


def _result(learned: Pair, of_pair: dict[str, Pair], bins: Sequence[Difference | None]) -> PairResult | None:
    """The result of a pair; None if no outcome of it could be tested."""
    names = learned.candidate.label, learned.reference.label
    tests = [
        OutcomeTest(_outcome(kind, (pair.candidate, pair.reference)), pair.outcome.difference, pair.outcome.adjusted_p)
        for kind, pair in of_pair.items()
        if pair.outcome is not None
    ]
    if not tests:
        return None
    missing = {"learned": of_pair["evaluation"].note, "kept": of_pair["base_images"].note}
    if learned.identical:
        count = " x ".join(str(size) for size in learned.shape[learned.shape[0] == 1 :])
        sentence = f"{names[0]} and {names[1]} are identical on every one of {count} losses: bit for bit the same."
        return PairResult("identical", sentence)
    return pair_result(names, tests, bins, missing)
