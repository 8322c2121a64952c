"""The page of the data study: what each setting of the data changed, by the pictures of the trained adapters."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from demo.data_study.results import FOLDER, NAMES, Study, studies
from demo.data_study.scores import DRAWN
from demo.data_study.text import ABOUT, LEAD, LIMITS, QUESTIONS, Question
from demo.painter import BASES, load_pipeline, paint
from sushi_research.files import write_atomic, write_image
from sushi_research.reports import page
from sushi_research.reports.page import Block
from sushi_research.sampling import plots

# Of each kind of pictures that a study asks for, how many are shown.
SHOWN = 2
SIGNIFICANT = 0.05


def write() -> None:
    """Writes data.md from the recorded runs."""
    blocks = [
        Block("title", "What captions, masks and prior preservation change"),
        *(Block("text", text) for text in LEAD),
    ]
    links = (f"[{name}]({name}/comparison.md)" for name in NAMES)
    blocks += [Block("text", f"All tests, with losses: {', '.join(links)}.")]
    blocks += [Block("heading", "What the runs show"), Block("list", items=claims())]
    for study in studies().values():
        about = ABOUT[study.name]
        blocks += [Block("heading", about.heading), *(Block("text", text) for text in about.texts)]
        blocks += [Block("table", rows=table(study)), Block("text", about.reading)]
        blocks += [Block("picture", about.heading, path=picture_of(study))]
    blocks += [Block("heading", "Limits"), Block("list", items=LIMITS)]
    write_atomic(FOLDER / "data.md", page.to_markdown(blocks).encode())


def picture_of(study: Study) -> Path:
    """Where the pictures of a study are."""
    return FOLDER / f"{study.name}.png"


def claims() -> list[str]:
    """What is claimed: the question, the answer of the test, and the scores that it is of."""
    found = studies()
    return [f"{each.text} {answer(found[each.study], each)}" for each in QUESTIONS]


def answer(study: Study, question: Question) -> str:
    """More, fewer or no difference shown, by the p-value among all tests of the study, with the means over seeds."""
    scores, reference = study.scores()[question.score], study.variants[0]
    mine, plain = scores[question.variant], scores[reference]
    means, of = [each.sum(1).mean() for each in (mine, plain)], plain.shape[1]
    alone, among = study.p_values()[question.score, question.variant]
    p, sure = f"p = {alone:.2g} alone, {among:.2g} among all tests", among <= SIGNIFICANT
    word = "No difference" if means[0] == means[1] else "No difference is shown"
    if sure:
        word = f"{'More' if means[0] > means[1] else 'Fewer'} pictures are right"
    which = f"`{question.variant}` {means[0]:.1f} and `{reference}` {means[1]:.1f} of {of} by `{question.score}`"
    return f"**{word}**: {which}." if means[0] == means[1] else f"**{word}**: {which} ({p})."


def table(study: Study) -> list[list[str]]:
    """A row for each variant: the mean of each score over the seeds, and the seeds' own in brackets."""
    scores = study.scores()
    rows = [["right of " + str(next(iter(next(iter(scores.values())).values())).shape[1]), *scores]]
    for variant in study.variants:
        counts = [scores[score][variant].sum(1) for score in scores]
        rows.append([variant, *(f"{each.mean():.1f} ({', '.join(map(str, each))})" for each in counts)])
    return rows


def draw(study: Study) -> None:
    """Draws the picture of a study with the adapters of the first seeds: a row for each prompt, a column for each variant."""
    asked = [
        (drawn.prompts[place], drawn.guidance, 1000 + place)
        for drawn in DRAWN[study.name].values()
        for place in range(SHOWN)
    ]
    rows: list[list[Image.Image]] = [[] for _ in asked]
    for variant in (None, *study.variants):
        pipeline = load_pipeline(BASES / "sd15", study.adapter(variant) if variant else None)
        for row, (prompt, guidance, seed) in zip(rows, asked, strict=True):
            row += paint(pipeline, [prompt], guidance=guidance, seed=seed)
    titles = [f"{prompt} (guidance {guidance:g})" for prompt, guidance, _ in asked]
    write_image(picture_of(study), plots.grid(rows, titles, ["base", *study.variants]))
