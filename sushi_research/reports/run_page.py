"""The page of a run, report.html: samples over time, curves, evaluations, training images, plan and provenance.

Everything is read from the run folder, so the page can be written again at any time, also of a run that was stopped or damaged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, TypeVar

from sushi_research.errors import UserError, printable
from sushi_research.files import write_atomic
from sushi_research.reports import (
    outcome_blocks,
    run_facts,
    run_outcomes,
    sample_series,
    thumbnails,
    training_curves,
)
from sushi_research.reports.best_step import BestStep
from sushi_research.reports.page import Block, Card, Picture, Source, to_html
from sushi_research.runs import records
from sushi_research.runs.metrics_file import MetricsFile
from sushi_research.runs.run_folder import RunFolder

Found = TypeVar("Found")

TRAINING_IMAGES = "Training images"


@dataclass(frozen=True)
class Additions:
    """What somebody adds to a run's page: a title and a paragraph in place of the run's name, numbers on top, pictures to compare
    the samples with by prompt, and blocks after the samples."""

    title: str = ""
    lead: str = ""
    cards: Sequence[Card] = ()
    references: Mapping[str, Source] = field(default_factory=dict)
    blocks: Sequence[Block] = ()


@dataclass(frozen=True)
class RunPage:
    """A run's page, and its best step if it was evaluated."""

    title: str
    blocks: list[Block]
    best: BestStep | None

    def html(self, training_images: bool = True) -> str:
        """The page as HTML; without `training_images`, they and their captions are not on it."""
        shown = self.blocks
        if not training_images:
            headings = [place for place, each in enumerate(shown) if each.kind == "heading"]
            first = next((place for place in headings if shown[place].text == TRAINING_IMAGES), len(shown))
            last = next((place for place in headings if place > first), len(shown))
            shown = [*shown[:first], *shown[last:]]
        return to_html(shown, self.title)


def write(run: RunFolder, state: str, additions: Additions = Additions()) -> RunPage:  # noqa: B008
    """Writes report.html and loss.png into the run folder. `state` is where the run is: "finished at step 500".

    What is damaged or missing is a sentence on the page. UserError if a file cannot be written.
    """
    page, curves = _page(run, state, additions)
    write_atomic(run.report, page.html().encode())
    if curves:
        training_curves.write(curves, run.curves, run.name)
    return page


def _page(run: RunFolder, state: str, additions: Additions) -> tuple[RunPage, dict[str, bytes]]:
    """The page, and the panels of its curves."""
    outcomes = run_outcomes.read(run)
    problems = list(outcomes.problems)

    def attempt(what: Callable[[], Found], otherwise: Found) -> Found:
        try:
            return what()
        except UserError as error:
            problems.append(str(error))
        except Exception as error:  # the page is no reason for a training to end with a traceback
            problems.append(f"a part of the page is missing ({type(error).__name__}: {error})")
        return otherwise

    # None if they are damaged: then it is not known how far the run is, and a sentence says why.
    lines: list[dict[str, Any]] | None = attempt(MetricsFile(run.metrics).read, None)
    metrics = lines or []
    plan: dict[str, Any] = attempt(lambda: records.read_as(run.plan, records.Plan, run_facts.REMEDY), {})
    step = None if lines is None else max((line["step"] for line in metrics), default=0)
    curves = attempt(lambda: training_curves.panels(metrics), {})
    best, evaluations = None, []
    if run.evaluation.exists():
        best, evaluations = outcome_blocks.blocks(run, state, outcomes, attempt)
    samples = attempt(lambda: sample_series.blocks(run, problems, additions.references), [])
    drift_is_shown = bool(evaluations)
    panels = [
        Picture(data, title) for title, data in curves.items() if not (drift_is_shown and title.startswith("drift"))
    ]
    parts: list[tuple[str, Sequence[Block]]] = [
        ("Samples", samples),
        ("", additions.blocks),
        ("", evaluations),
        ("Adapter files", attempt(lambda: run_facts.adapter_files(run), [])),
        ("Curves", [Block("panels", pictures=panels)] if panels else []),
        (TRAINING_IMAGES, attempt(lambda: _training_images(run), [])),
        ("Plan", attempt(lambda: run_facts.plan_facts(plan), []) if plan else []),
        ("Problems of the data", attempt(lambda: run_facts.data_problems(run), [])),
        ("Stage timings", attempt(lambda: run_facts.stage_timings(run), [])),
        ("Provenance", attempt(lambda: run_facts.launches(run), [])),
        ("Config", attempt(lambda: run_facts.config(run), [])),
    ]
    written = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    steps = plan.get("steps")
    going_on = state.startswith("at step")
    until = ", and again at each sample grid and evaluation" if going_on else ""
    lead = f"{state[:1].upper()}{state[1:]}. Written {written}{until}."
    cards = attempt(lambda: run_facts.cards(run, metrics, plan, step), [])
    body = [
        block for title, found in parts if found for block in ([Block("heading", title)] if title else []) + [*found]
    ]
    name = printable(run.name)
    blocks = [
        Block("title", additions.title or name),
        Block("lead", lead),
        *(
            [Block("progress", f"step {step} of {steps}", share=min(1.0, step / steps))]
            if steps and step is not None and step < steps
            else []
        ),
        *([Block("text", additions.lead)] if additions.lead else []),
        *(Block("cards", cards=list(each)) for each in (additions.cards, cards) if each),
        *([Block("warning", items=list(dict.fromkeys(problems)))] if problems else []),
        Block("contents"),
        *body,
    ]
    title = f"{name}: {additions.title}" if additions.title else f"{name}: {state}"
    return RunPage(title, blocks, best), curves


def _training_images(run: RunFolder) -> list[Block]:
    """The thumbnails with their captions; [] if there are none."""
    if not run.thumbnails.exists():
        return []
    shown, count = thumbnails.pictures(run)
    words = f"{count} images" if count != 1 else "1 image"
    more = (
        f"; {len(shown)} of them are shown, and {count - len(shown)} more are in data_report.json"
        if count > len(shown)
        else ""
    )
    return [
        Block("lead", f"{words}, each with its caption{more}. Tap a long caption to read all of it."),
        Block("pictures", pictures=shown),
    ]
