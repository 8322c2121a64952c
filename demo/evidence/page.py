"""The page of an experiment: one table, the result of each variant in words, and the limits."""

from __future__ import annotations

from statistics import mean

from demo.evidence import rates
from demo.evidence.study import FURTHER_PAIRS, Study
from demo.evidence.texts import INTERVALS, TEXTS
from demo.records import ROOT
from sushi_research.files import write_atomic
from sushi_research.reports import page
from sushi_research.reports.page import Block

READING = (
    "Means of the seeds. Learned and kept are logs of the loss over the base's: of held-out images at the noisiest quarter of "
    "the timesteps (below 0 is learned), and of pictures that the base itself drew (above 0 is lost). The scores are of "
    "pictures drawn with the adapter file, each seed's in brackets: concept is the share of right ones among 32 of what was to "
    "be learned, kept that among 32 of the base's world. {further}A step is its CPU time on one core, the median of all steps; "
    "on a GPU the variants compare differently. Result: of the pair with {reference}, by all tests of all pairs as one family "
    "(Holm). A dash: not measured in every seed, or not finite."
)
OFFSET = "Brightness error: how far the mean of a picture is from that of the drawing of its scene, from 0 to 1; less is better. "
FURTHER = (
    "Besides the pairs with {reference} these were tested: {pairs}. They are in the same family, so the corrected p-values "
    "here are at least as large as those in comparison.md, which does not have them."
)
LENGTHS = (
    "One run at a constant rate, its averages by `scripts/reconstruct_ema.py`. One seed, and many lengths on the same images: "
    "the lowest of several losses is lower than it would be on other images, so the picture shows a range of lengths, and not "
    "the best one."
)


def write(name: str) -> None:
    """Writes docs/examples/NAME/NAME.md from the recorded runs."""
    write_atomic(Study.of(name).folder / f"{name}.md", page.to_markdown(blocks(Study.of(name))).encode())


def blocks(study: Study) -> list[Block]:
    """The page of an experiment. UserError if what it needs is not recorded."""
    texts, found = TEXTS[study.name], study.comparison
    made = [
        Block("title", texts.title),
        Block("text", f"{texts.about} {of_reference(study)}".strip()),
        Block(
            "text",
            f"`make experiment EXP=configs/experiments/{study.name}.yaml` trains and scores the runs, and `python -m demo.evidence "
            f"{study.name}` writes this page from them. Their records are in `runs`, so that `compare_runs.py "
            f"docs/examples/{study.name}/runs --reference {study.reference}` compares them again; its page, with all tests, is "
            "[comparison.md](comparison.md).",
        ),
        Block("table", rows=table(study)),
        Block("text", READING.format(reference=study.reference, further=OFFSET if study.name == "night" else "")),
        Block("heading", "Test results"),
        Block("list", items=results(study)),
        Block("text", INTERVALS),
    ]
    if further := FURTHER_PAIRS.get(study.name):
        pairs = ", ".join(f"{one} with {other}" for one, other in further)
        made.append(Block("text", FURTHER.format(reference=study.reference, pairs=pairs)))
    if disagreements := [result.disagreement for _, result in found.decided if result.disagreement]:
        made += [Block("heading", "Where losses mislead"), Block("list", items=disagreements)]
    if study.name == "optimizers":
        made += [
            Block("heading", "Learning rates"),
            Block("table", rows=rates.table()),
            Block("text", rates.reading()),
        ]
    if (picture := study.folder / "lengths.png").is_file():
        made += [
            Block("heading", "Averages of any length"),
            Block("picture", "Validation loss by length", path=picture),
            Block("text", LENGTHS),
        ]
    if notes := [note.replace(f"{ROOT}/", "") for note in (*found.problems, *found.warnings)]:
        made += [Block("heading", "Notes on the runs"), Block("list", items=notes)]
    return [*made, Block("heading", "Limits"), Block("list", items=list(texts.limits))]


def of_reference(study: Study) -> str:
    """How many of the pictures of the reference's runs are right, from their scores; "" without them."""
    right = study.scores(study.reference).get("concept", [None])
    return "" if None in right else f"Of the pictures of {study.reference}, {mean(right):.0%} are right."


def results(study: Study) -> list[str]:
    """A sentence for each pair, and for each variant of which a run diverged."""
    found, said = study.comparison, []
    for variant in study.variants:
        if runs := study.diverged(variant):
            why = "; ".join(f"{name}: {text}" for name, text in runs.items())
            said.append(f"{variant} {study.said_of_diverged(variant)}, and is not compared ({why}).")
    if study.diverged(study.reference):
        said.append("Nothing is compared with the reference, because a run of it diverged.")
    if said:
        said.append("comparison.md leaves out runs that diverged, and compares the seeds that finished.")
    for pair, result in zip(found.learned, found.results, strict=True):
        names = pair.candidate.label, pair.reference.label
        said.append(result.sentence if result else f"{names[0]} and {names[1]} are not tested: {pair.note}.")
    return said


def table(study: Study) -> list[list[str]]:
    """A row for each variant."""
    texts, words = TEXTS[study.name].variants, {}
    for pair, result in study.comparison.decided:
        if pair.reference.label == study.reference:
            words[pair.candidate.label] = result.word
    heads = (f"score {name}" for name in study.score_names)
    rows = [["", "", "loss: learned", "loss: kept", *heads, "ms a step", "result"]]
    for variant in study.variants:
        losses, seconds = (
            [study.last(variant, f"evaluation/{key}") for key in ("learned", "kept")],
            study.seconds(variant),
        )
        untested = "" if variant == study.reference else "not tested"
        rows.append(
            [
                variant,
                texts[variant],
                *("-" if value is None else f"{value:+.3f}" for value in losses),
                *map(share, study.scores(variant).values()),
                "-" if seconds is None else f"{1000 * seconds:.0f}",
                study.said_of_diverged(variant) or words.get(variant, untested),
            ]
        )
    return rows


def share(of_seeds: list[float | None]) -> str:
    """The mean of a score over the seeds, and each seed's; a dash for one that has none, and then for the mean."""
    known = [each for each in of_seeds if each is not None]
    each = ", ".join("-" if one is None else f"{one:.2f}" for one in of_seeds)
    return f"{f'{mean(known):.2f}' if len(known) == len(of_seeds) else '-'} ({each})"
