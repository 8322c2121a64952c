"""The contents of a comparison page: results as sentences, then plots, then tables of details."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from sushi_research.evaluation.outcomes import KEPT_MARGIN, LEARNED_BINS, LEARNED_MARGIN
from sushi_research.experiments import outcome_sections, tables
from sushi_research.experiments.comparison import Comparison
from sushi_research.experiments.pairs import Pair
from sushi_research.reports.outcome_tests import PairResult, bin_name
from sushi_research.reports.page import Block, Link
from sushi_research.runs.run_folder import RunFolder

# Kinds of the list of results, for their colour, and the order of the list.
_KINDS = {"better": "better", "worse": "worse"}
_ORDER = ("better", "worse", "trade-off", "undecided", "not distinguishable", "identical")
MOST_SENTENCES = 8
_BINS = " and ".join(bin_name(number) for number in LEARNED_BINS)


def blocks(comparison: Comparison, title: str, pictures: dict[str, Path], folder: Path = Path()) -> list[Block]:
    """The blocks of the page, in order. `pictures` are the existing image files, by the name of their plot; `folder` is that of the
    page, for its links to the runs' pages."""
    page = [Block("title", title), Block("contents")]
    page += _results(comparison)
    if comparison.warnings or comparison.problems:
        page += [Block("heading", "Read with care"), Block("warning", items=comparison.warnings + comparison.problems)]
    page += _picture(pictures, "trade_off", "Learned against kept", _TRADE_OFF)
    page += _picture(pictures, "curves", "Learned", _CURVES)
    page += _picture(pictures, "differences", "Differences of the pairs", _DIFFERENCES)
    page += _picture(pictures, "matrix", "All pairs", "")
    page += _picture(pictures, "pictures", "Pictures of the same prompts and seeds", _PICTURES)
    page += [Block("heading", "What differs"), *tables.settings(comparison)]
    where = "At equal samples seen" if comparison.step is None else f"At step {comparison.step}"
    page += outcome_sections.family(comparison.learned, f"{where}: learned", mse=True)
    page += _picture(pictures, "timestep_bins", "Learned by timestep", _TIMESTEP_BINS) or [
        Block("heading", "Learned by timestep")
    ]
    page += outcome_sections.bins(comparison)
    page += outcome_sections.family(comparison.seconds, "At equal training time: learned", "seconds", mse=True)
    page += outcome_sections.kept(comparison)
    page += outcome_sections.memorised_images(comparison)
    page += outcome_sections.pictures_and_scores(comparison)
    page += outcome_sections.noise(comparison)
    page += [Block("heading", "Speed and memory"), Block("table", rows=tables.speed(comparison))]
    page += [*tables.stage_timings(comparison), Block("text", _SPEED)]
    page += _picture(pictures, "samples", "The same prompts and seeds", _SAMPLES) or [
        Block("heading", "Samples"),
        Block("text", "No two variants have images of the same prompts and seeds."),
    ]
    page += [Block("heading", "Runs"), Block("table", rows=tables.runs(comparison))]
    if links := run_pages(comparison, folder):
        page += [Block("text", "The runs' own pages:"), Block("links", links=links)]
    page += [Block("text", _METHOD)]
    return page


_MEANING = (
    f'"Learned" is the log of the loss over the base\'s on held-out images, at {_BINS}. "Kept" is the same on pictures that the '
    'base itself generated for neutral prompts. "Better" means more of one of the two, and not less of the other by more than a '
    f"margin of {LEARNED_MARGIN:g} for learned and {KEPT_MARGIN:g} for kept; more of one and less of the other is a trade-off. "
    "Among all outcomes of all pairs the chance of even one wrong difference is at most 5 % (Holm); that an outcome is within its "
    "margin is said by the 95 % interval of that pair alone. Where pictures of a side are measured, they decide and losses do not; "
    "scores that are decided lead as well. In a study on tiny bases (docs/examples/measure/measure.md) the measures of pictures "
    "ordered at least 90 % of clearly different adapters as a checker of their pictures did, on each of three subjects; losses did "
    "so for a large thing, not for a small one and a style. Compare the pictures before you choose."
)
_TRADE_OFF = (
    "One point for each run and evaluation, joined in the order of training; the last is larger, and the star is the base. To the "
    "right more was learned, downwards more of the base was lost. Bars are 95 % intervals (Student's t) over held-out images and "
    "over captions. With more than six variants only the last points are marked, with their intervals."
)
_CURVES = (
    f"The log of the loss over the base's at {_BINS}, by the mean over the held-out images; below 0 is better than the base. "
    "Bands are 95 % intervals over images (Student's t) of the mean over a variant's seeds; they do not include the variation "
    "between seeds. Variants whose bands overlap in the upper row may still differ, because runs are compared image by image, as "
    "in the lower row."
)
_DIFFERENCES = (
    "Paired by image (or caption) and noise sample; at most the first 30 pairs. "
    "Bars are 95 % intervals of a single pair, bootstrapped over images. A point is "
    "filled if the difference is distinguishable from 0 after the correction for the number of tests."
)
_PICTURES = (
    "Drawn at the last evaluation with pictures, by the first run of each of at most 12 variants. "
    "Prompts marked learned are captions of held-out "
    "images, those marked kept are neutral ones."
)
_TIMESTEP_BINS = "Quarters of the schedule, least noise first, at the last evaluation; 95 % intervals over images."
_SAMPLES = "The first run of each of at most 12 variants, at its last sampled step."
_SPEED = (
    "Images per second, by the wall clock, is the median over training steps. Training times exclude evaluating, sampling and "
    "saving. GPU and CPU time also exclude waiting for data, and other load on the machine hardly changes them. Memory is the "
    "largest peak of any process (GPU memory, or total memory on a CPU)."
)
_METHOD = (
    "The method, its measured coverage and its sources are in docs/experiments.md. A pair is tested at the last point that both "
    "variants reached, or at a step that was given beforehand; this rule is fixed in advance. Losses are interpolated between "
    "evaluations. All outcomes of all pairs at that point are one family of tests; what was learned at equal training time, and "
    "the drift, are two more. Each is corrected for its own number of tests (Holm). Runs of one seed are averaged and count as "
    "one. Seeds are paired if both variants have the same two or more."
)


def _results(comparison: Comparison) -> list[Block]:
    found, decided = [], comparison.decided
    if disagreements := [result.disagreement for _, result in decided if result.disagreement]:
        if len(disagreements) > MOST_SENTENCES:
            more = f"so it is with {len(disagreements) - MOST_SENTENCES} more pairs, which are in comparison.json"
            disagreements[MOST_SENTENCES:] = [more]
        found += [Block("heading", "Losses and pictures disagree"), Block("warning", items=disagreements)]
    found += [Block("heading", "Test result"), Block("text", _MEANING)]
    if comparison.by_run:
        text = "All of these are runs of one variant: they are compared run by run, so no result is about variants."
        found.append(Block("text", text))
    if not decided:
        return [*found, Block("text", f"None: {why_none(comparison)}.")]
    ordered = sorted(decided, key=_interest)
    if len(decided) > 6:
        counts = [f"{sum(result.word == word for _, result in decided)} {word}" for word in _ORDER]
        text = f"Of {len(decided)} pairs, each the first named against the second: {', '.join(counts)}."
        found.append(Block("text", text))
    if best := _best(comparison, decided):
        found.append(Block("text", best))
    items = [f"{_KINDS.get(result.word, 'none')}|{result.sentence}" for _, result in ordered[:MOST_SENTENCES]]
    found.append(Block("result", items=items))
    if len(ordered) > MOST_SENTENCES:
        found.append(
            Block("text", f"The other {len(ordered) - MOST_SENTENCES} are in comparison.json, and in the tables below.")
        )
    return found


def _interest(each: tuple[Pair, PairResult]) -> tuple[bool, int, float]:
    """Pairs in which losses and pictures disagree first, then by the result, then by what was learned."""
    pair, result = each
    rank = 0 if result.word in _KINDS else _ORDER.index(result.word)
    return not result.disagreement, rank, pair.outcome.difference.p_value if pair.outcome else 1.0


def sentences(comparison: Comparison) -> list[str]:
    """Each pair's result as a sentence, in the order of the pairs, after a disagreement of losses and pictures."""
    return [" ".join(filter(None, (result.disagreement, result.sentence))) for _, result in comparison.decided]


def why_none(comparison: Comparison) -> str:
    """Why no pair has a test result."""
    if len(comparison.variants) == 1:
        return "there is nothing to compare it with"
    notes = sorted({pair.note for pair in comparison.learned if pair.note})
    more = [f"and {len(notes) - 4} more reasons"] if len(notes) > 4 else []
    return "; ".join([*notes[:4], *more]) or "there are no pairs"


def _best(comparison: Comparison, decided: Sequence[tuple[Pair, PairResult]]) -> str:
    """A sentence that names the variant that is better than all others; "" if there is none."""
    wins: dict[str, int] = {}
    for pair, result in decided:
        winner = {"better": pair.candidate, "worse": pair.reference}.get(result.word)
        if winner is not None:
            wins[winner.label] = wins.get(winner.label, 0) + 1
    others = len(comparison.variants) - 1
    champions = [label for label, count in wins.items() if count == others > 1]
    what = "run" if comparison.by_run else "variant"
    return f"{champions[0]} is better than every other {what}." if champions else ""


def run_pages(comparison: Comparison, folder: Path) -> list[Link]:
    """Links to those pages of runs that exist, relative to `folder`."""
    found = []
    for variant in comparison.variants:
        for run in variant.runs:
            page = RunFolder(run.path, None).report
            if page.is_file():
                text = run.name if run.name == variant.label else f"{variant.label}: {run.name}"
                path = Path(os.path.relpath(page, folder)).as_posix()
                found.append(Link(text, quote(os.fsencode(path))))  # a name need not be valid Unicode
    return found


def _picture(pictures: dict[str, Path], name: str, heading: str, text: str) -> list[Block]:
    if name not in pictures:
        return []
    found = [Block("heading", heading), Block("picture", heading, path=pictures[name])]
    return found + ([Block("text", text)] if text else [])
