"""The sections of a comparison page with one outcome each: its pairs with their tests, and the values of the variants."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import numpy as np

from sushi_research.evaluation.memorisation import image_means, memorised
from sushi_research.evaluation.outcomes import log_ratio
from sushi_research.experiments.comparison import SCORE, Comparison
from sushi_research.experiments.means import mean_with_error
from sushi_research.experiments.pairs import Pair, removed_by_seeds
from sushi_research.experiments.seeds import per_seed, runs_that_count
from sushi_research.reports.outcome_tests import BINS, OUTCOMES, bin_name
from sushi_research.reports.page import Block
from sushi_research.reports.run_record import RunRecord
from sushi_research.reports.statistics import Difference, t_quantile
from sushi_research.reports.training_log import WALL

MOST_PAIRS = 60
_KEPT = (
    "The log of the loss over the base's on pictures that the base itself generated for neutral prompts (and on prior images where "
    "there are some), at the last evaluation; 0 is as the base, above 0 something was lost. The drift is how far predictions moved "
    "from the base's on these captions: the mean squared difference, in the unit of the loss. It is a family of tests of its own "
    "and not part of the result."
)
_MEMORISED = (
    "How well losses tell training images from held-out ones, as many of each, at the last evaluation. An AUC of 0.5 does not tell "
    "them apart, 1 recognises every training image. The gap is the mean log loss of held-out images minus that of training images. "
    "Well below 0.5, the training images are of another kind than the held-out ones, such as prior images that are trained on. "
    "Recognising training images is not copying them: this is no part of the result."
)
_BINS = (
    "The difference in log loss in each quarter of the schedule, least noise first, with the 95 % interval of that bin and pair "
    "alone. If bins whose intervals exclude 0 disagree in sign, nothing is said about what was learned."
)


def family(pairs: Sequence[Pair], heading: str, axis: str = "samples", mse: bool = False) -> list[Block]:
    """The tests of an outcome, pair by pair, and why others have none. `mse`: with a column of the plain mean losses."""
    if not pairs:
        return []
    tested = by_p_value([pair for pair in pairs if pair.outcome is not None])
    found = [Block("heading", heading)] if heading else []
    if tested and axis == "seconds":
        found.append(Block("text", _clock(tested)))
    if tested:
        head = ["candidate - reference", f"at {axis}", "difference", "95 % interval", "p", "p among tests", "result"]
        head += ["detectable from", "units", "seeds", *(["mean MSE"] if mse else [])]
        rows = [head + (["wall clock, s"] if axis == "seconds" else [])]
        rows += [_row(pair, axis, mse) for pair in tested[:MOST_PAIRS]]
        found.append(Block("table", rows=rows))
        if len(tested) > MOST_PAIRS:
            more = f"{len(tested) - MOST_PAIRS} more pairs are in comparison.json, none with a clearer difference."
            found.append(Block("text", more))
    reasons: dict[str, list[str]] = {}
    for pair in pairs:
        if pair.note:
            reasons.setdefault(pair.note, []).append(f"{pair.candidate.label} - {pair.reference.label}")
    items = [
        f"{', '.join(names[:4])}{' and more' if len(names) > 4 else ''}: {note}" for note, names in reasons.items()
    ]
    return [*found, Block("list", items=items)] if items else found


def by_p_value(pairs: Sequence[Pair]) -> list[Pair]:
    """The tested pairs, the clearest difference first."""
    return sorted(pairs, key=lambda pair: (pair.outcome.adjusted_p, pair.outcome.difference.p_value))


def _clock(tested: Sequence[Pair]) -> str:
    clocks = sorted({pair.clock for pair in tested})
    text = f"Training time is {' or '.join(clocks)}, without evaluating, sampling and saving; a pair has one clock."
    if WALL in clocks:
        text += " Runs that recorded no GPU or CPU time are compared by the wall clock, which other load on the machine changes."
    return f"{text} The last column is the wall clock at that point, of the candidate and of the reference."


def _row(pair: Pair, axis: str, mse: bool) -> list[str]:
    d: Difference = pair.outcome.difference
    at = "last" if pair.at is None else f"{pair.at:.0f}" if axis == "samples" else f"{pair.at:.1f}"
    losses = pair.mean_losses
    relative = f"{losses[1] / losses[0] - 1:+.2%}" if losses and losses[0] else "-"
    return [
        f"{pair.candidate.label} - {pair.reference.label}",
        at,
        f"{d.value:+.3g}",
        f"{d.low:+.3g} to {d.high:+.3g}",
        f"{d.p_value:.2g}",
        f"{pair.outcome.adjusted_p:.2g}",
        pair.word,
        f"{d.smallest_detectable:.2g}",
        f"{d.images} x {d.noise_samples}",
        f"{d.seeds[1]} / {d.seeds[0]}" + (", same seeds" if pair.same_seeds else ""),
        *([relative] if mse else []),
        *([f"{pair.wall_seconds[1]:.1f} / {pair.wall_seconds[0]:.1f}"] if pair.wall_seconds else []),
    ]


def bins(comparison: Comparison) -> list[Block]:
    """The differences of the pairs by timestep bin."""
    tested = [(pair, found) for pair, found in zip(comparison.learned, comparison.bins, strict=True) if any(found)]
    if not tested:
        return []
    rows = [["candidate - reference", *(bin_name(number) for number in BINS)]]
    for pair, found in tested[:MOST_PAIRS]:
        cells = ["no noise samples" if d is None else f"{d.value:+.3g} ({d.low:+.3g} to {d.high:+.3g})" for d in found]
        rows.append([f"{pair.candidate.label} - {pair.reference.label}", *cells])
    return [Block("table", rows=rows), Block("text", _BINS)]


def kept(comparison: Comparison) -> list[Block]:
    """What was kept of the base: each variant's values at its last evaluation, and the tests."""
    kinds = {"base_images": "base's own pictures", "prior": "prior images", "drift": "drift"}
    rows = [["", *(f"{name}, with standard error" for name in kinds.values())]]
    for variant in comparison.variants:
        cells = [_mean(runs_that_count(variant.runs), kind) for kind in kinds]
        if set(cells) != {"-"}:
            rows.append([variant.label, *cells])
    found = [Block("heading", "Kept")]
    found += [Block("table", rows=rows), Block("text", _KEPT)] if len(rows) > 1 else []
    for kind in ("base_images", "prior"):
        if kind in comparison.outcomes:
            found += family(comparison.outcomes[kind], f"Kept, pair by pair: {OUTCOMES[kind].unit}")
    if any("drift" in run.curves for variant in comparison.variants for run in variant.runs):
        found += family(comparison.drift, "Drift, pair by pair")
    return found


def _mean(runs: Sequence[RunRecord], kind: str) -> str:
    """A variant's mean log ratio at the last evaluations (of the drift: its mean); "-" if it cannot be had."""
    curves = [run.curves.get(kind) for run in runs]
    if any(curve is None for curve in curves) or len({curve.measured_on for curve in curves}) > 1:
        return "-"

    def of_run(run: RunRecord) -> np.ndarray:
        curve = run.curves[kind]
        return curve.loss[-1] if kind == "drift" else log_ratio(curve.loss[-1], curve.base)

    return mean_with_error(per_seed(runs, of_run), ".3g" if kind == "drift" else "+.3g")


def memorised_images(comparison: Comparison) -> list[Block]:
    """How well each run recognises its training images."""
    rows = [["run", "step", "AUC", "95 % interval", "gap", "95 % interval"]]
    for run in [run for variant in comparison.variants for run in variant.runs]:
        trained, held_out = run.curves.get("trained"), run.evaluation
        common = sorted({*trained.steps} & {*held_out.steps}) if trained and held_out else []
        if not common:
            continue
        means = [image_means(c.loss[c.steps.index(common[-1])], c.base) for c in (trained, held_out)]
        if (found := memorised(*means)) is not None:
            half = t_quantile(0.975, found.gap_degrees) * found.gap_se if found.gap_se else None
            gap = f"{found.gap - half:+.3g} to {found.gap + half:+.3g}" if half else "-"
            interval = f"{found.low:.2f} to {found.high:.2f}"
            rows.append([run.name, str(common[-1]), f"{found.auc:.2f}", interval, f"{found.gap:+.3g}", gap])
    if len(rows) == 1:
        return []
    return [Block("heading", "Memorised"), Block("table", rows=rows), Block("text", _MEMORISED)]


def pictures_and_scores(comparison: Comparison) -> list[Block]:
    """The tests of pictures and of the user's scores, and the scores as columns."""
    found = []
    for kind in ("pictures_learned", "pictures_kept"):
        if kind in comparison.outcomes:
            found += family(comparison.outcomes[kind], f"By pictures: {OUTCOMES[kind].unit}")
    names = [kind for kind in comparison.outcomes if kind.startswith(SCORE)]
    if names:
        rows = [["mean of a score (units)", *(name.removeprefix(SCORE) for name in names)]]
        for variant in comparison.variants:
            rows.append([variant.label, *(_score(variant.runs, name.removeprefix(SCORE)) for name in names)])
        found += [Block("heading", "Scores"), Block("table", rows=rows)]
    for name in names:
        found += family(comparison.outcomes[name], f"By {name} (below 0: the candidate is better)")
    return found


def _score(runs: Sequence[RunRecord], name: str) -> str:
    values = [run.scores[name].values.values() for run in runs_that_count(runs) if name in run.scores]
    if not values:
        return "-"
    units = {len(each) for each in values}
    mean = np.mean([np.mean(list(each)) for each in values])
    return f"{mean:.3g} ({'-'.join(map(str, sorted(units)))})"


def noise(comparison: Comparison) -> list[Block]:
    tested = [pair for pair in comparison.learned if pair.outcome is not None and not pair.identical]
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
