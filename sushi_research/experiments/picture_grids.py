"""Sample grids of a comparison: pictures of the base and of variants side by side, with the same prompts and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from sushi_research.experiments.comparison import Comparison
from sushi_research.files import write_image
from sushi_research.reports.run_record import RunRecord
from sushi_research.sampling import plots

LABEL = "prompt"
# In the labels of pictures of neutral captions; their files are called 00-kept-seed0.png.
KEPT = "[kept,"


def samples(comparison: Comparison, path: Path) -> bool:
    """Saves a grid of samples; see `_side_by_side`."""
    return _side_by_side(comparison, "samples", path)


def pictures(comparison: Comparison, path: Path) -> bool:
    """Saves a grid of the pictures drawn at evaluations, those of held-out captions first; see `_side_by_side`."""
    return _side_by_side(comparison, "pictures", path)


def _side_by_side(comparison: Comparison, folder: str, path: Path) -> bool:
    """Saves a grid of the images of the base and of each variant's first run at its last step that has some, for common prompts and
    seeds. Returns whether there are any.
    """
    names: list[str] = []
    columns: list[dict[str, Path]] = []
    base: dict[str, Path] = {}
    for variant in comparison.variants[:12]:
        first, last = _images(variant.runs[0], folder, comparison.problems)
        if not last:
            continue
        # The base's images are a run's samples at step 0, unless it starts from an adapter file; without those the base has no
        # column.
        if not base and "facts.start_from" not in variant.runs[0].identity:
            base = first
        names.append(variant.label)
        columns.append(last)
    if not columns:
        return False
    if base:  # a variant may be called base too
        names, columns = ["base", *names], [base, *columns]
    common = [label for label in columns[0] if all(label in images for images in columns)]
    if not common:
        return False
    cells = []
    common = _both_kinds(common)
    for label in common:
        cells.append([])
        for images in columns:
            with Image.open(images[label]) as image:
                cells[-1].append(image.convert("RGB"))
    write_image(path, plots.grid(plots.for_page(cells), common, names))
    return True


def _both_kinds(labels: Sequence[str]) -> list[str]:
    """At most twelve labels: half of them of neutral captions if there are some."""
    kept = [label for label in labels if KEPT in label]
    others = [label for label in labels if KEPT not in label]
    return others[: 12 - min(6, len(kept))] + kept[: 12 - min(6, len(others))]


def _images(run: RunRecord, within: str, problems: list[str]) -> tuple[dict[str, Path], dict[str, Path]]:
    """(label -> image file) in a folder of the run, at step 0 and at the last step; labels contain the prompt and the rest of
    the file's name: the seed, and of pictures of evaluations "learned" or "kept"."""
    folders = (run.path / within).glob("step-*")
    steps = sorted(folder for folder in folders if folder.name[5:].isdecimal() and folder.is_dir())
    found = []
    for step in (steps[:1] if steps and int(steps[0].name[5:]) == 0 else [], steps[-1:]):
        labels = {}
        for file in sorted(path for folder in step for path in folder.glob("*.png")):
            if problem := plots.picture_problem(file):
                problems.append(f"{file} is not an image (it {problem}): it is skipped")
                continue
            with Image.open(file) as image:
                labels[f"{image.info.get(LABEL, file.stem)} [{file.stem[3:].replace('-seed', ', seed ')}]"] = file
        found.append(labels)
    return found[0], found[1]
