"""The page of an experiment: one table, the result of each variant in words, and the limits."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import mean

from demo.evidence.study import Study
from demo.evidence.texts import TEXTS
from sushi_research.errors import UserError
from sushi_research.files import make_folder, write_atomic, write_json
from sushi_research.reports import page
from sushi_research.reports.page import Block
from sushi_research.runs.run_folder import RunFolder

READING = (
    "Means of the seeds. Learned and kept are logs of the loss over the base's: of held-out images at the noisiest quarter of "
    "the timesteps (below 0 is learned), and of pictures that the base itself drew (above 0 is lost). The scores are of "
    "pictures drawn with the adapter file: the share of right ones among 32 of the concept and 32 of the base's world, with "
    "each seed in brackets. Result: of the pair with {reference}, by all tests of all pairs as one family (Holm)."
)
OFFSET = "Brightness error: how far the mean of a picture is from that of the drawing of its scene, from 0 to 1; less is better."
# Of the optimizers.
RATES = "learning_rates.json"


def write(name: str) -> None:
    """Writes docs/examples/NAME/NAME.md from the recorded runs."""
    study, texts = Study.of(name), TEXTS[name]
    found = study.comparison
    blocks = [
        Block("title", texts.title),
        Block("text", texts.about),
        Block(
            "text",
            f"`make experiment EXP=configs/experiments/{name}.yaml` trains and scores the runs, and `python -m demo.evidence "
            f"{name}` writes this page from them. Their records are in `runs`, so that `compare_runs.py "
            f"docs/examples/{name}/runs --reference {study.reference}` compares them again; its page, with all tests, is "
            "[comparison.md](comparison.md).",
        ),
        Block("table", rows=table(study)),
        Block("text", READING.format(reference=study.reference) + (f" {OFFSET}" if name == "night" else "")),
        Block("heading", "Test results"),
        Block("list", items=[result.sentence for _, result in found.decided]),
    ]
    if disagreements := [result.disagreement for _, result in found.decided if result.disagreement]:
        blocks += [Block("heading", "Where losses mislead"), Block("list", items=disagreements)]
    if (study.folder / RATES).is_file():
        blocks += [
            Block("heading", "Learning rates"),
            Block("table", rows=rates_table()),
            Block("text", rates_reading()),
        ]
    if (picture := study.folder / "lengths.png").is_file():
        blocks += [
            Block("heading", "Averages of any length"),
            Block("picture", "Validation loss by length", path=picture),
        ]
        blocks += [Block("text", "One run at a constant rate, its averages by `scripts/reconstruct_ema.py`.")]
    blocks += [Block("heading", "Limits"), Block("list", items=list(texts.limits))]
    write_atomic(study.folder / f"{name}.md", page.to_markdown(blocks).encode())


def table(study: Study) -> list[list[str]]:
    """A row for each variant."""
    texts, results = TEXTS[study.name], {pair.candidate.label: result.word for pair, result in study.comparison.decided}
    scores = {variant: study.scores(variant) for variant in study.variants}
    names = list(scores[study.reference])
    heads = (f"score {name}" for name in names)
    rows = [["", "", "loss: learned", "loss: kept", *heads, "ms a step", "result"]]
    for variant in study.variants:
        cells = [study.last(variant, f"evaluation/{key}") for key in ("learned", "kept")]
        rows.append(
            [
                variant,
                texts.variants[variant],
                *("" if value is None else f"{value:+.3f}" for value in cells),
                *(_share(scores[variant][name]) for name in names),
                f"{1000 * study.seconds(variant):.0f}",
                "" if variant == study.reference else results.get(variant, "not tested"),
            ]
        )
    return rows


def _share(of_seeds: list[float]) -> str:
    return f"{mean(of_seeds):.2f} ({', '.join(f'{each:.2f}' for each in of_seeds)})"


def write_rates() -> dict[str, float]:
    """Records the validation losses of optimizers_rates.yaml; returns the best rate of each optimizer."""
    study, losses = Study.of("optimizers_rates"), {}
    [seed] = study.content["seeds"]
    for variant, settings in study.content["variants"].items():
        last = last_loss(study.trained / f"{variant}-seed{seed}")
        losses.setdefault(settings["optimizer"]["name"], {})[f"{settings['optimizer']['lr']:g}"] = last
    folder = Study.of("optimizers").folder
    make_folder(folder)  # its other files come later, from the runs with these rates
    write_json(folder / RATES, {"seed": seed, "loss": losses})
    return best_rates()


def last_loss(run: Path) -> float | None:
    """The validation loss of a run at its end; None of one that diverged, whose last evaluation is an earlier one."""
    record = RunFolder(run, None).record()
    if record is None:
        raise UserError(f"{run} holds no run: make experiment EXP=configs/experiments/optimizers_rates.yaml first.")
    if record["finished_at"] is None:
        return None
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return next(line["evaluation/loss"] for line in reversed(lines) if "evaluation/loss" in line)


def best_rates() -> dict[str, float]:
    """The rate with the lowest recorded validation loss, by optimizer; a run that diverged has none."""
    losses = json.loads((Study.of("optimizers").folder / RATES).read_text(encoding="utf-8"))["loss"]
    return {
        name: float(min(of_it, key=lambda rate: math.inf if of_it[rate] is None else of_it[rate]))
        for name, of_it in losses.items()
    }


def rates_table() -> list[list[str]]:
    """The recorded validation losses: a row for each optimizer, the lowest marked."""
    losses, best = json.loads((Study.of("optimizers").folder / RATES).read_text(encoding="utf-8"))["loss"], best_rates()
    rows = [["", "", "", ""]]
    for name, of_it in losses.items():
        cells = [f"{rate}: {'not finished' if loss is None else f'{loss:.5f}'}" for rate, loss in of_it.items()]
        rows.append(
            [
                name,
                *(
                    f"**{cell}**" if float(rate) == best[name] else cell
                    for cell, rate in zip(cells, of_it, strict=True)
                ),
            ]
        )
    return rows


def rates_reading() -> str:
    """What the table of learning rates is."""
    seed = json.loads((Study.of("optimizers").folder / RATES).read_text(encoding="utf-8"))["seed"]
    return (
        f"Validation loss at each learning rate, of one run each with seed {seed}, which no run of the experiment has "
        "(`make experiment EXP=configs/experiments/optimizers_rates.yaml`); the lowest, in bold, is that of the experiment."
    )
