"""Compares runs: groups them into variants, finds the settings that differ, and tests each pair.

Runs of one seed count as one (seeds.py). A pair of variants (variants.py) is tested at the last point that both reached, in
samples seen or in seconds of training (clocks.py). This rule is fixed in advance. The two axes are two families, each corrected
for its number of pairs. The statistics are in reports/statistics.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sushi_research.errors import UserError, some
from sushi_research.evaluation.results import MIN_IMAGES
from sushi_research.experiments import code_variants, repetitions
from sushi_research.experiments.clocks import clocks_of, wall_seconds_at
from sushi_research.experiments.evaluated_files import notes_on_files, with_distinct_names, without_chosen
from sushi_research.experiments.seeds import by_seed, notes_on_seeds, per_seed, runs_that_count
from sushi_research.experiments.variants import SEED, Variant, variants_called, variants_of
from sushi_research.reports import statistics
from sushi_research.reports.run_record import Curve, RunRecord
from sushi_research.reports.statistics import MAX_PAIRS, Difference, PairedTestResult

# Settings of locations and output, which do not distinguish variants.
PLACES = ("run.", "cache.", "tracking.", "sample.", "checkpoint.", "dry_run", "adapters", "lora_scales", "output")
PLACES += tuple(f"evaluation.{key}" for key in ("path", "split", "every", "noise_samples", "drift_captions"))


@dataclass
class Pair:
    """A candidate and a reference. `outcome` is a PairedTestResult, or None with the reason in `note`; `at` is the common point.

    `losses` are those of the reference and of the candidate, [distinct seeds, N, K] each. At equal training time, `clock` is what
    measured it, and `wall_seconds` the wall-clock seconds of the two at that point.
    """

    candidate: Variant
    reference: Variant
    at: float | None = None
    clock: str = ""
    wall_seconds: tuple[float, float] | None = None
    losses: tuple[np.ndarray, np.ndarray] | None = None
    same_seeds: bool = False
    note: str = ""
    outcome: PairedTestResult | None = None
    identical: bool = False


@dataclass
class Comparison:
    """The contents of the comparison page. `by_run`: all runs belong to one variant and are compared one by one."""

    variants: list[Variant]
    by_run: bool
    differing: dict[str, list[Any]]
    samples: list[Pair]
    seconds: list[Pair]
    drift: list[Pair]
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def compare(records: Sequence[RunRecord], reference: str | None = None, pool_code: bool = False) -> Comparison:
    """Compares runs. UserError if there are none, or if no variant is called `reference`.

    `pool_code`: runs of one variant may have been trained with different code.
    """
    if not records:
        raise UserError("there is no run to compare: give the folders of two runs or more.")
    records, excluded = without_chosen(records)
    if not records:
        raise UserError(f"there is no run to compare: {excluded[0]}.")
    records = with_distinct_names([record.with_sorted_names() for record in records])
    variants, by_run = variants_of(records, pool_code)
    pairs = list(_pairs(variants, reference))
    problems = [problem for record in records for problem in record.problems]
    families = {
        "samples": _family(pairs, lambda a, b: _at_common_point(a, b, "samples")),
        "seconds": _family(pairs, lambda a, b: _at_common_point(a, b, "seconds")),
        "drift": _family(pairs, _at_the_end),
    }
    warnings = [*warnings_of(records), *code_variants.warnings(records, pool_code), *repetitions.warnings(records)]
    warnings += excluded + notes_on_files(records)
    warnings += [note for variant in variants for note in notes_on_seeds(variant.runs, variant.label)]
    return Comparison(variants, by_run, differing(variants), warnings=warnings, problems=problems, **families)


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
    return found | code_variants.differing([v.runs for v in variants], [v.is_file for v in variants])


def warnings_of(records: Sequence[RunRecord]) -> list[str]:
    """Warnings about differences that limit the comparability of the runs, one sentence each."""
    found: list[str] = []
    timing, rounding = "their training times are not comparable", "rounding may differ"
    checks: list[tuple[str, Callable[[RunRecord], Any], str]] = [
        ("validation set", lambda r: r.evaluation and r.evaluation.set_hash, "no test result between them"),
        ("base", lambda r: (r.entry.get("base") or {}).get("unet"), "their losses start at different values"),
        ("precision", lambda r: r.entry.get("precision"), "rounding differs"),
        ("random scheme", lambda r: r.entry.get("random_scheme"), "their noise differs"),
        ("device", lambda r: r.entry.get("device"), timing),
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


def _pairs(variants: Sequence[Variant], reference: str | None) -> Iterator[tuple[Variant, Variant]]:
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


def _family(pairs: Sequence[tuple[Variant, Variant]], losses_of: Callable[[Variant, Variant], Pair]) -> list[Pair]:
    """The pairs with their test results, corrected for the number of pairs that can be compared."""
    found = [losses_of(candidate, reference) for candidate, reference in pairs]
    comparable = [pair for pair in found if pair.losses is not None]
    count = len(comparable)
    if count > MAX_PAIRS:
        for pair in comparable:
            pair.losses, pair.note = None, f"{count} pairs are too many to test: name one with --reference"
        return found
    differences: list[Difference] = []
    for pair in comparable:
        of_reference, of_candidate = pair.losses
        differences.append(
            statistics.paired_difference(of_reference, of_candidate, same_seeds=pair.same_seeds, pairs=count)
        )
        pair.identical = of_reference.shape == of_candidate.shape and bool((of_reference == of_candidate).all())
    for pair, outcome in zip(comparable, statistics.paired_test_results(differences), strict=True):
        pair.outcome = outcome
    return found


def _at_common_point(candidate: Variant, reference: Variant, axis: str) -> Pair:
    """The pair with its losses at the last point of the axis that all runs reach, interpolated between evaluations."""
    pair = Pair(candidate, reference, same_seeds=_same_seeds(candidate, reference))
    curves = _curves(pair, [run.evaluation for run in runs_that_count(candidate.runs, reference.runs)])
    if curves is None:
        return pair
    if candidate.is_file or reference.is_file:
        if axis == "seconds":
            pair.note = "an adapter file has no training time"
        else:
            pair.losses = _last(reference, "evaluation"), _last(candidate, "evaluation")
        return pair
    if axis == "seconds" and len(clocks := clocks_of(curves)) > 1:
        pair.note = f"their training times are by different clocks ({' and '.join(clocks)})"
        return pair
    axes = [curve.axis(axis) for curve in curves]
    if any(points is None for points in axes):
        pair.note = f"the {axis} of a run are not recorded"
        return pair
    if any((np.diff(points) <= 0).any() for points in axes):
        pair.note = f"the {axis} of a run do not increase from evaluation to evaluation"
        return pair
    at = float(min(points[-1] for points in axes))
    if at <= 0 or at < max(points[0] for points in axes):
        pair.note = "they have no evaluated point in common after the first"
        return pair
    pair.at = at
    sides = (reference, candidate)

    def losses_of(run: RunRecord) -> np.ndarray:
        return statistics.interpolate(run.evaluation.axis(axis), run.evaluation.loss, [at])[0]

    pair.losses = tuple(per_seed(variant.runs, losses_of) for variant in sides)
    if axis == "seconds":
        pair.clock, pair.wall_seconds = clocks[0], tuple(wall_seconds_at(variant.runs, at) for variant in sides)
    return pair


def _at_the_end(candidate: Variant, reference: Variant) -> Pair:
    """The pair with the drift at the last evaluations as its losses; captions take the place of images."""
    pair = Pair(candidate, reference, same_seeds=_same_seeds(candidate, reference))
    runs = runs_that_count(candidate.runs, reference.runs)
    behind = [run for run in runs if run.drift and run.evaluation and run.drift.steps[-1] != run.evaluation.steps[-1]]
    if behind:
        pair.note = f"{behind[0].name} has no drift at its last evaluation, only at step {behind[0].drift.steps[-1]}"
    elif _curves(pair, [run.drift for run in runs], "drift measured", "captions") is not None:
        pair.losses = _last(reference, "drift"), _last(candidate, "drift")
    return pair


def _curves(
    pair: Pair, curves: Sequence[Curve | None], what: str = "evaluation", units: str = ""
) -> list[Curve] | None:
    """The curves if they can be compared; else None, with the reason in `pair.note`."""
    known = [curve for curve in curves if curve is not None]
    if len(known) < len(curves):
        pair.note = f"a run has no {what}"
    elif len({curve.set_hash for curve in known}) > 1:
        pair.note = "they were measured on different validation sets"
    elif len({curve.measured_on for curve in known}) > 1:
        pair.note = "their files differ in images, noise samples or timesteps, although they name one validation set"
    elif len(known[0].names) < MIN_IMAGES:
        # A run's images are held out; whether those of an evaluated file are is not always known.
        units = units or ("images" if pair.candidate.is_file or pair.reference.is_file else "held-out images")
        pair.note = f"{len(known[0].names)} {units} are too few for a test result, which needs {MIN_IMAGES}"
    elif not all(np.isfinite(curve.loss).all() for curve in known):
        pair.note = "a run's losses are not finite"
    else:
        return known
    return None


def _last(variant: Variant, kind: str) -> np.ndarray:
    """Losses [distinct seeds, N, K] of the runs' last evaluations."""
    return per_seed(variant.runs, lambda run: getattr(run, kind).loss[-1])


def _same_seeds(candidate: Variant, reference: Variant) -> bool:
    """Whether both have the same two or more distinct seeds, so that seeds are paired. Does not depend on the results."""
    seeds = list(by_seed(candidate.runs))
    return len(seeds) > 1 and seeds == list(by_seed(reference.runs))


def removed_by_seeds(pair: Pair) -> float | None:
    """The share of the variance between runs that pairing by seed removed; None with fewer than two common seeds.

    1 - var(difference of runs with the same seed) / (var(reference's runs) + var(candidate's runs)). Negative if pairing added
    variance.
    """
    if not pair.same_seeds or pair.losses is None:
        return None
    reference, candidate = (losses.mean((1, 2)) for losses in pair.losses)
    unpaired = reference.var(ddof=1) + candidate.var(ddof=1)
    return float(1 - (candidate - reference).var(ddof=1) / unpaired) if unpaired > 0 else None
