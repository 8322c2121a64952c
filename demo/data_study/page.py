"""The page of the data study: what each setting of the data changed, by the pictures of the trained adapters."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from demo.data_study.results import FOLDER, Study, studies
from demo.data_study.scores import DRAWN
from demo.data_study.text import ABOUT, CLAIMS, LEAD, LIMITS, Claim
from demo.painter import BASES, load_pipeline, paint
from sushi_research.files import write_atomic, write_image
from sushi_research.reports import page
from sushi_research.reports.page import Block
from sushi_research.sampling import plots

# Of each kind of pictures that a study asks for, how many are shown.
SHOWN = 2


def write() -> None:
    """Writes data.md from the recorded runs."""
    blocks = [
        Block("title", "What captions, masks and prior preservation change"),
        *(Block("text", text) for text in LEAD),
    ]
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
    return FOLDER / study.name / "asked.png"


def claims() -> list[str]:
    """What is claimed, each with the scores and the test that it is of."""
    found = studies()
    return [f"{claim.text} {evidence(found[claim.study], claim)}" for claim in CLAIMS]


def evidence(study: Study, claim: Claim) -> str:
    """The scores of a claim, the reference's first, and the p-value among all tests of the study."""
    scores, (alone, among) = study.scores()[claim.score], study.p_values()[claim.score, claim.variant]
    of = scores[claim.variant].shape[1]
    means = [f"{scores[name].sum(1).mean():.1f}" for name in (study.variants[0], claim.variant)]
    return f"(`{claim.score}`: {means[1]} of {of} pictures against {means[0]}, p = {alone:.2g} alone, {among:.2g} among all tests)"


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
