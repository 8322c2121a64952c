"""The contents of a comparison page: test results as sentences, then plots, then tables of details."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from sushi_research.experiments import tables
from sushi_research.experiments.clocks import clocks_of
from sushi_research.experiments.comparison import Comparison, Pair, removed_by_seeds
from sushi_research.experiments.means import mean_and_error
from sushi_research.experiments.seeds import by_seed, per_seed
from sushi_research.experiments.variants import Variant
from sushi_research.reports.page import Block
from sushi_research.reports.statistics import Difference
from sushi_research.reports.training_log import WALL

MOST_PAIRS = 60


def blocks(comparison: Comparison, title: str, pictures: dict[str, Path]) -> list[Block]:
    """The blocks of the page, in order. `pictures` are the existing image files, by the function's name in plots.py."""
    page = [Block("title", title)]
    page += _test_results(comparison)
    if comparison.warnings or comparison.problems:
        page += [Block("heading", "Read with care"), Block("warning", items=comparison.warnings + comparison.problems)]
    page += _picture(pictures, "curves", "Validation loss", _CURVES)
    page += _picture(pictures, "differences", "Differences at equal samples seen", _DIFFERENCES)
    page += _picture(pictures, "matrix", "All pairs", "")
    page += [Block("heading", "What differs"), *tables.settings(comparison)]
    page += _family(comparison.samples, "At equal samples seen", "samples")
    page += _family(comparison.seconds, "At equal training time", "seconds")
    page += _picture(pictures, "timestep_bins", "By timestep, at the last evaluation", _TIMESTEP_BINS)
    page += _drift(comparison)
    page += _noise(comparison)
    page += [Block("heading", "Speed and memory"), Block("table", rows=tables.speed(comparison))]
    page += [*tables.stage_timings(comparison), Block("text", _SPEED)]
    if "samples" in pictures:
        page += _picture(
            pictures,
            "samples",
            "The same prompts and seeds",
            "The first run of each variant, at its last sampled step.",
        )
    else:
        page += [
            Block("heading", "Samples"),
            Block("text", "No two variants have images of the same prompts and seeds."),
        ]
    page += [Block("heading", "Runs"), Block("table", rows=tables.runs(comparison)), Block("text", _METHOD)]
    return page


_MEANING = (
    '"Better" means a lower validation loss. It does not mean better pictures: compare the samples before you choose.'
)
_CURVES = (
    "Mean over the validation images of the loss minus the base's on the same noise; below 0 is better than the base. Bands are 95 "
    "% intervals over images (Student's t) of the mean over a variant's seeds; they do not include the variation between seeds. "
    "Variants whose bands overlap in the upper row may still differ, because runs are compared image by image, as in the lower row."
)
_DIFFERENCES = (
    "Paired by image and noise sample. Bars are 95 % intervals of a single pair, bootstrapped over images. A point is filled "
    "if the test result, which is corrected for the number of pairs, is better or worse."
)
_TIMESTEP_BINS = "Quarters of the schedule, least noise first; 95 % intervals over images. No tests are done here."
_SPEED = (
    "Images per second, by the wall clock, is the median over training steps. Training times exclude evaluating, sampling and "
    "saving. GPU and CPU time also exclude waiting for data, and other load on the machine hardly changes them. Memory is the "
    "largest peak of any process (GPU memory, or total memory on a CPU)."
)
_METHOD = (
    "The method, its measured coverage and its sources are in docs/experiments.md. A pair is tested at the last point that both "
    "variants reached; this rule is fixed in advance. Losses are interpolated between evaluations. The two axes are two families, "
    "each corrected for its own number of pairs (Holm). Runs of one seed are averaged and count as one. Seeds are paired if both "
    "variants have the same two or more."
)


def _test_results(comparison: Comparison) -> list[Block]:
    tested = [pair for pair in comparison.samples if pair.outcome is not None]
    found = [Block("heading", "Test result"), Block("text", _MEANING)]
    if comparison.by_run:
        found.append(
            Block(
                "text",
                "All of these are runs of one variant: they are compared run by run, so no result is about variants.",
            )
        )
    if not tested:
        found.append(Block("text", f"None: {why_none(comparison)}."))
        return found
    ordered = _by_interest(tested)
    decided = sum(pair.outcome.outcome != "not distinguishable" for pair in tested)
    if len(tested) > 6:
        found.append(
            Block("text", f"{decided} of {len(tested)} pairs are distinguishable, at a family-wise error of 5 %.")
        )
    best = _best(comparison, tested)
    if best:
        found.append(Block("text", best))
    found.append(Block("result", items=[f"{_kind(pair)}|{sentence(pair)}" for pair in ordered[:8]]))
    if len(ordered) > 8:
        found.append(Block("text", f"The other {len(ordered) - 8} are in the table below."))
    return found


def why_none(comparison: Comparison) -> str:
    """Why no pair has a test result at equal samples seen."""
    if len(comparison.variants) == 1:
        return "there is nothing to compare it with"
    return "; ".join(sorted({pair.note for pair in comparison.samples if pair.note})) or "there are no pairs"


def _by_interest(pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs sorted: distinguishable pairs first, then by p-value."""
    return sorted(pairs, key=lambda p: (_kind(p) == "none", p.outcome.adjusted_p, p.outcome.difference.p_value))


def _kind(pair: Pair) -> str:
    return {"better": "better", "worse": "worse"}.get(pair.outcome.outcome, "none")


def _best(comparison: Comparison, tested: Sequence[Pair]) -> str:
    """A sentence that names the variant that is better than all others; "" if there is none."""
    wins: dict[str, int] = {}
    for pair in tested:
        winner = {"better": pair.candidate, "worse": pair.reference}.get(pair.outcome.outcome)
        if winner is not None:
            wins[winner.label] = wins.get(winner.label, 0) + 1
    others = len(comparison.variants) - 1
    champions = [label for label, count in wins.items() if count == others > 1]
    return f"{champions[0]} is better than every other variant." if champions else ""


def sentence(pair: Pair) -> str:
    """A pair's test result as a sentence."""
    if pair.identical:
        runs, images, noise_samples = pair.losses[0].shape
        count = f"{runs} x " if runs > 1 else ""
        return (
            f"{pair.candidate.label} and {pair.reference.label} are identical on every one of {count}{images} x {noise_samples} "
            "losses: bit for bit the same."
        )
    return pair.outcome.sentence(pair.candidate.label, pair.reference.label)


def _picture(pictures: dict[str, Path], name: str, heading: str, text: str) -> list[Block]:
    if name not in pictures:
        return []
    found = [Block("heading", heading), Block("picture", heading, path=pictures[name])]
    return found + ([Block("text", text)] if text else [])


def _family(pairs: Sequence[Pair], heading: str, axis: str) -> list[Block]:
    if not pairs:
        return []
    tested = _by_interest([pair for pair in pairs if pair.outcome is not None])
    found = [Block("heading", heading)]
    if tested and axis == "seconds":
        found.append(Block("text", _clock(tested)))
    if tested:
        head = ["candidate - reference", f"at {axis}", "difference", "relative", "95 % interval", "p", "p among pairs"]
        rows = [head + ["result", "detectable from", "seeds", *(["wall clock, s"] if axis == "seconds" else [])]]
        for pair in tested[:MOST_PAIRS]:
            rows.append(_row(pair, axis))
        found.append(Block("table", rows=rows))
        if len(tested) > MOST_PAIRS:
            found.append(
                Block(
                    "text",
                    f"{len(tested) - MOST_PAIRS} more pairs are in comparison.json, none with a clearer difference.",
                )
            )
    reasons: dict[str, list[str]] = {}
    for pair in pairs:
        if pair.note:
            reasons.setdefault(pair.note, []).append(f"{pair.candidate.label} - {pair.reference.label}")
    items = [
        f"{', '.join(names[:4])}{' and more' if len(names) > 4 else ''}: {note}" for note, names in reasons.items()
    ]
    return [*found, Block("list", items=items)] if items else found


def _clock(tested: Sequence[Pair]) -> str:
    clocks = sorted({pair.clock for pair in tested})
    text = f"Training time is {' or '.join(clocks)}, without evaluating, sampling and saving; a pair has one clock."
    if WALL in clocks:
        text += " Runs that recorded no GPU or CPU time are compared by the wall clock, which other load on the machine changes."
    return f"{text} The last column is the wall clock at that point, of the candidate and of the reference."


def _row(pair: Pair, axis: str) -> list[str]:
    d: Difference = pair.outcome.difference
    at = "last" if pair.at is None else f"{pair.at:.0f}" if axis == "samples" else f"{pair.at:.1f}"
    return [
        f"{pair.candidate.label} - {pair.reference.label}",
        at,
        f"{d.value:+.3g}",
        f"{d.relative:+.2%}",
        f"{d.low:+.3g} to {d.high:+.3g}",
        f"{d.p_value:.2g}",
        f"{pair.outcome.adjusted_p:.2g}",
        "identical" if pair.identical else pair.outcome.outcome,
        f"{d.smallest_detectable:.2g}",
        f"{d.seeds[1]} / {d.seeds[0]}" + (", same seeds" if pair.same_seeds else ""),
        *([f"{pair.wall_seconds[1]:.1f} / {pair.wall_seconds[0]:.1f}"] if pair.wall_seconds else []),
    ]


def _drift(comparison: Comparison) -> list[Block]:
    known = [variant for variant in comparison.variants if all(run.drift is not None for run in variant.runs)]
    if not known:
        return []
    rows = [["", "drift from the base", "standard error over captions"]]
    for variant in known:
        if len({run.drift.measured_on for run in variant.runs}) == 1:
            mean, error = mean_and_error(per_seed(variant.runs, lambda run: run.drift.loss[-1]))
            rows.append([variant.label, f"{mean:.3g}", f"{error:.2g}" if np.isfinite(error) else "-"])
    text = (
        "How far predictions moved from the base's on captions that were not trained on, at the last evaluation: the mean squared "
        "difference, in the unit of the loss. Less is not always better, but drift without a gain means that the base's knowledge "
        "was lost. The pairs below are a third family; better means less drift."
    )
    found = [Block("heading", "Drift from the base"), Block("table", rows=rows), Block("text", text)]
    return found + _family(comparison.drift, "Drift, pair by pair", "samples")[1:]


def _noise(comparison: Comparison) -> list[Block]:
    tested = [pair for pair in comparison.samples if pair.outcome is not None and not pair.identical]
    if not tested:
        return []
    by_images = [pair.outcome.difference.variance_reduction for pair in tested]
    finite = [value for value in by_images if np.isfinite(value)]
    items = []
    if finite:
        items.append(
            "All runs were evaluated on the same images with the same noise. With different images for each, "
            f"{median(finite):.3g} times as many would be needed for the same error (the median of {len(finite)} pairs): the "
            f"shared validation set removed {1 - 1 / median(finite):.2%} of the variance."
        )
    by_seed = [share for share in map(removed_by_seeds, tested) if share is not None]
    if by_seed:
        items.append(
            "Variants trained with the same seeds saw the same samples with the same noise. Pairing their runs by seed removed "
            f"{median(by_seed):.0%} of the variance between runs (the median of {len(by_seed)} pairs; below 0 it added some)."
        )
    else:
        items.append("How much variance shared training seeds removed is unknown: that needs two or more common seeds.")
    return [Block("heading", "Variance removed by shared noise"), Block("list", items=items)]


def numbers(comparison: Comparison) -> dict[str, Any]:
    """All numbers of the page, as JSON values."""
    families = {"samples": comparison.samples, "seconds": comparison.seconds, "drift": comparison.drift}
    return {
        "variants": [_variant(variant) for variant in comparison.variants],
        "by_run": comparison.by_run,
        "differing": comparison.differing,
        "families": {name: [_pair(pair) for pair in pairs] for name, pairs in families.items()},
        "warnings": comparison.warnings,
        "problems": comparison.problems,
    }


def _variant(variant: Variant) -> dict[str, Any]:
    curves = [run.evaluation for run in variant.runs if run.evaluation]
    found = {"label": variant.label, "runs": [str(run.path) for run in variant.runs], "seeds": list(variant.seeds)}
    return found | {"distinct_seeds": len(by_seed(variant.runs)), "clocks": clocks_of(curves)}


def _pair(pair: Pair) -> dict[str, Any]:
    found: dict[str, Any] = {"candidate": pair.candidate.label, "reference": pair.reference.label, "at": pair.at}
    if pair.outcome is None:
        return found | {"note": pair.note}
    d = pair.outcome.difference
    values = {name: getattr(d, name) for name in d.__dataclass_fields__}
    finite = {
        name: value if not isinstance(value, float) or np.isfinite(value) else None for name, value in values.items()
    }
    found |= {"outcome": pair.outcome.outcome, "adjusted_p": pair.outcome.adjusted_p, "identical": pair.identical}
    if pair.wall_seconds is not None:
        reference, candidate = pair.wall_seconds
        found |= {"clock": pair.clock, "wall_seconds": {"candidate": candidate, "reference": reference}}
    return found | {"same_seeds": pair.same_seeds, "removed_by_seeds": removed_by_seeds(pair), "difference": finite}
