"""The page of the study: which measures follow the scores, on which concepts, and what may be claimed of them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from demo.study import candidates, choices, plots, results
from demo.study.analysis import Agreement, agreement, ordered
from demo.study.recipes import SETTINGS
from demo.study.results import FOLDER, Measured
from demo.study.text import LEAD, LIMITS, MEASURES, SCATTER, UNAGI
from demo.study.topping import PATH, SETTING
from sushi_research.files import write_atomic
from sushi_research.reports import page
from sushi_research.reports.page import Block

# A measure is claimed to follow a score where it orders this share of the pairs rightly.
GOAL = 0.9


def write() -> None:
    """Writes measure.md and its plot from the recorded results."""
    studied = results.recorded()
    assert studied, f"no results are recorded in {FOLDER}"
    scatter = FOLDER / "scatter.png"
    plots.scatter(studied, scatter)
    blocks = [Block("title", "Do the numbers follow the pictures?"), *(Block("text", text) for text in LEAD)]
    blocks += [Block("heading", "What may be claimed"), Block("list", items=claims(studied))]
    blocks += [Block("heading", "Measures against scores"), Block("picture", "Measures against scores", path=scatter)]
    blocks += [Block("text", SCATTER)]
    blocks += _section(
        "Learned: pairs of adapters in the order of the concept score", table(studied, "learned"), "learned"
    )
    blocks += _section("Kept: pairs of adapters in the order of the kept score", table(studied, "kept"), "kept")
    blocks += _section("Memorised", memorised_table(studied), "memorised")
    blocks += _section("Results of pairs", choices.pairs_table(studied), "pairs")
    blocks += _section("Choosing a checkpoint", choices.lengths_table(studied), "choosing")
    blocks += topping_blocks(studied.get(SETTING, []))
    blocks += [Block("heading", "Limits"), Block("list", items=LIMITS)]
    blocks += [Block("heading", "All adapters"), Block("table", rows=adapters_table(studied))]
    write_atomic(FOLDER / "measure.md", page.to_markdown(blocks).encode())


def _section(heading: str, rows: list[list[str]], name: str) -> list[Block]:
    return [Block("heading", heading), Block("table", rows=rows), Block("text", MEASURES[name])]


def topping_blocks(adapters: list[Measured]) -> list[Block]:
    """Why losses follow the pictures of a topping less: the loss in its area alone, and the scores without guidance."""
    if not adapters or not PATH.exists():
        return []
    found = json.loads(PATH.read_text())
    entries = [found[f"{adapter.recipe}-{adapter.steps:03d}"] for adapter in adapters]
    recipes = [adapter.recipe for adapter in adapters]
    without = [entry["without_guidance"] for entry in entries]
    measured = {name: values(adapters, "learned", name) for name in ("mse", "log, t >= 750")}
    measured["log, t >= 750, in the area of the topping"] = [entry["in_the_area"][3] for entry in entries]
    name = "pictures, distance from the held-out images"
    measured[name] = values(adapters, "learned", name)
    rows = [["measure", "pairs in order, with guidance", "without guidance"]]
    for name, mine in measured.items():
        shares = [agreement(mine, right, recipes) for right in (scores(adapters, "learned"), without)]
        rows.append([name, *(f"{a.share:.0%} [{a.share_low:.0%}, {a.share_high:.0%}] of {a.pairs}" for a in shares)])
    counts = [["adapter", "right, with guidance", "without", "nearest scene right", *list(measured)[1:3]]]
    for number, adapter in enumerate(adapters):
        shown = [adapter.concept, without[number], adapter.nearest]
        logs = [f"{mine[number]:+.2f}" for mine in list(measured.values())[1:3]]
        counts.append([f"{adapter.recipe} at {adapter.steps}", *map(str, shown), *logs])
    texts = [Block("text", text) for text in UNAGI]
    return [
        Block("heading", "Why unagi is different"),
        texts[0],
        Block("table", rows=rows),
        *texts[1:],
        Block("table", rows=counts),
    ]


def scores(adapters: list[Measured], kind: str) -> list[int]:
    """The score that a kind of measure should follow."""
    return [adapter.concept if kind == "learned" else adapter.kept for adapter in adapters]


def values(adapters: list[Measured], kind: str, name: str) -> list[float]:
    """A measure's mean over images or prompts, for each adapter."""
    return [float((a.learned if kind == "learned" else a.kept_measures)[name].mean()) for a in adapters]


def agreement_of(adapters: list[Measured], kind: str, name: str) -> Agreement:
    """How well a measure follows its score on one setting."""
    return agreement(values(adapters, kind, name), scores(adapters, kind), [adapter.recipe for adapter in adapters])


def table(studied: dict[str, list[Measured]], kind: str) -> list[list[str]]:
    """A row for each measure; for each setting the share of pairs in the right order and the rank correlation, with intervals."""
    rows = [["measure", *(f"{name}: {what}" for name in studied for what in ("pairs in order", "rank correlation"))]]
    first = next(iter(studied.values()))[0]
    for name in first.learned if kind == "learned" else first.kept_measures:
        row = [f"**{name}**" if name in candidates.IN_USE[kind] else name]
        for adapters in studied.values():
            a = agreement_of(adapters, kind, name)
            row += [
                f"{a.share:.0%} [{a.share_low:.0%}, {a.share_high:.0%}] of {a.pairs}",
                f"{a.spearman:+.2f} [{a.spearman_low:+.2f}, {a.spearman_high:+.2f}]",
            ]
        rows.append(row)
    return rows


def claims(studied: dict[str, list[Measured]]) -> list[str]:
    """For each measure in use: where it orders `GOAL` of the pairs rightly, and where it does not."""
    said = []
    for kind, names in candidates.IN_USE.items():
        for name in names:
            pairs = {
                setting: ordered(np.array(values(adapters, kind, name)), np.array(scores(adapters, kind)))
                for setting, adapters in studied.items()
            }
            told = {setting: f"{setting} {right / max(of, 1):.0%} of {of}" for setting, (right, of) in pairs.items()}
            reached = [told[setting] for setting, (right, of) in pairs.items() if of and right / of >= GOAL]
            missed = [text for text in told.values() if text not in reached]
            text = f"{kind}, by *{name}*: " + (f"claimed on {', '.join(reached)}" if reached else "claimed nowhere")
            said.append(text + (f"; not on {', '.join(missed)}." if missed else "."))
    return said


def memorised_table(studied: dict[str, list[Measured]]) -> list[list[str]]:
    """The AUC of the trained photos against held-out images at each length, the range over recipes."""
    rows = [["setting", "length", "AUC, lowest to highest recipe", "concept score, lowest to highest"]]
    for setting in SETTINGS:
        adapters = studied.get(setting.name, [])
        for steps in setting.steps if adapters else ():
            these = [adapter for adapter in adapters if adapter.steps == steps and adapter.memorised is not None]
            aucs, right = [a.memorised for a in these], [a.concept for a in these]
            rows.append(
                [setting.name, str(steps), f"{min(aucs):.2f} to {max(aucs):.2f}", f"{min(right)} to {max(right)}"]
            )
    return rows


def adapters_table(studied: dict[str, list[Measured]]) -> list[list[str]]:
    """Every adapter with its scores and the measures in use."""
    names = [(kind, name) for kind, in_use in candidates.IN_USE.items() for name in in_use]
    rows = [["adapter", "concept of 32", "kept of 32", "mse", *(f"{kind}: {name}" for kind, name in names), "AUC"]]
    for setting, adapters in studied.items():
        for a in adapters:
            shown: list[Any] = [
                (a.learned if kind == "learned" else a.kept_measures)[name].mean() for kind, name in names
            ]
            auc = "-" if a.memorised is None else f"{a.memorised:.2f}"
            row = [f"{setting}: {a.recipe} at {a.steps}", str(a.concept), str(a.kept), f"{a.learned['mse'].mean():.4f}"]
            rows.append([*row, *(f"{value:+.3f}" for value in shown), auc])
    return rows
