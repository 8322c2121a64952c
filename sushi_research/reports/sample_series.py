"""The samples of a run over its steps, for its page: one row of pictures for each prompt and seed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from sushi_research.reports import thumbnails
from sushi_research.reports.page import Block, Picture, Source
from sushi_research.runs.run_folder import RunFolder
from sushi_research.sampling import plots, sample_grids

MOST_STEPS, MOST_ROWS = 8, 16
# The longer side of a picture in pixels, if there are few of them and if there are many.
SIDES, MANY = (512, 320), 40


def blocks(run: RunFolder, problems: list[str], references: Mapping[str, Source]) -> list[Block]:
    """A series of pictures for each prompt of the last step with samples; [] without samples.

    At most MOST_STEPS steps are shown, the first and the last among them, and MOST_ROWS prompts. `references` are pictures to
    compare with, by prompt, such as a real one. Damaged pictures become sentences in `problems`.
    """
    steps = _steps(run.samples)
    if not steps:
        return []
    *_, (_, last) = steps
    rows = {label: path.name for path in sorted(last.glob("*.png")) if (label := _label(path, problems)) is not None}
    shown = thumbnails.spaced(steps, MOST_STEPS)
    count = min(len(rows), MOST_ROWS)
    side = SIDES[count * len(shown) > MANY]
    found = []
    for label, name in list(rows.items())[:MOST_ROWS]:
        pictures = [
            Picture(thumbnails.of_picture(folder / name, side), "before training" if step == 0 else f"step {step}")
            for step, folder in shown
            if _label(folder / name, problems) == label
        ]
        if label in references:
            pictures.append(Picture(references[label], "a real picture"))
        found.append(Block("series", label, pictures=pictures))
    notes = []
    if len(steps) > len(shown):
        notes.append(f"{len(shown)} of {len(steps)} steps are shown.")
    if len(rows) > count:
        notes.append(f"{count} of {len(rows)} prompts are shown.")
    notes.append("The same prompt and seed in each row; the pictures in full size are in the folder samples.")
    return [Block("lead", " ".join(notes)), *found]


def _steps(samples: Path) -> list[tuple[int, Path]]:
    """(step, folder) of all steps that have samples."""
    folders = ((step, sample_grids.step_folder(samples, step)) for step in sample_grids.steps_of(samples))
    return [(step, folder) for step, folder in folders if any(folder.glob("*.png"))]


def _label(path: Path, problems: list[str]) -> str | None:
    """The prompt of a picture; None for one that is missing or damaged, which becomes a problem."""
    if problem := plots.picture_problem(path):
        if problem != plots.MISSING:
            problems.append(f"{path} {problem}: the page is without it")
        return None
    return label_of(path)


def label_of(path: Path) -> str:
    """The prompt in a picture's PNG text, or the file's name."""
    with Image.open(path) as image:
        return str(image.info.get(sample_grids.LABEL, path.stem))
