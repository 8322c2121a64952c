"""The validation loss of averages of several lengths against that of the weights themselves: a table and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sushi_research.errors import UserError
from sushi_research.evaluation.result_arrays import by_image
from sushi_research.evaluation.results import MIN_IMAGES, Results
from sushi_research.reports.statistics import Difference, paired_difference
from sushi_research.runs.run_folder import RESULT_FILES
from sushi_research.sampling import plots

# The length of the weights of the last step themselves.
NO_AVERAGE = 0.0


@dataclass(frozen=True)
class MeasuredLength:
    """The mean validation loss of an average of this length, minus that of the weights themselves. `difference` has the interval,
    None with fewer images than one needs."""

    length: float
    loss: float
    over_weights: float
    difference: Difference | None


def measured(output: Path, folders: Mapping[float, str]) -> list[MeasuredLength]:
    """What scripts/evaluate.py has measured into the folders in `output`, by length; NO_AVERAGE is among them.

    UserError if the results of one are missing, damaged or not finite.
    """
    losses = {length: _losses(output / folders[length]) for length in sorted(folders)}
    reference, found = losses[NO_AVERAGE], []
    for length, loss in losses.items():
        has_interval = length != NO_AVERAGE and len(loss) >= MIN_IMAGES
        difference = paired_difference(reference, loss, pairs=len(losses) - 1) if has_interval else None
        found.append(MeasuredLength(length, loss.mean(), loss.mean() - reference.mean(), difference))
    return found


def table(found: Sequence[MeasuredLength]) -> list[str]:
    """The lines of a table, the smallest loss marked, and what the marked one is worth."""
    best = min(found, key=lambda each: each.loss)
    lines = ["length  validation loss  over the weights (95 % interval)"]
    for each in found:
        change = "" if each.length == NO_AVERAGE else f"{each.over_weights:+.6f}"
        if each.difference is not None:
            change += f" ({each.difference.low:+.6f} to {each.difference.high:+.6f})"
        name = "weights" if each.length == NO_AVERAGE else f"{each.length:g}"
        lines.append(f"{name:<7} {each.loss:<16.6f} {change}{'  <- smallest' if each is best else ''}".rstrip())
    images = "" if found[-1].difference else f"; intervals need {MIN_IMAGES} images or more"
    return [
        *lines,
        f"each interval is of its length alone{images}. The smallest of {len(found)} losses on these images is smaller than "
        "it will be on others: measure the one that you choose on images of its own.",
    ]


def plot(found: Sequence[MeasuredLength], title: str, path: Path) -> None:
    """Writes the picture: the difference of each length's loss from that of the weights, with its interval."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    lengths, values = [each.length for each in found], [each.over_weights for each in found]
    halves = [each.difference.high - each.difference.value if each.difference else 0.0 for each in found]
    axes.errorbar(lengths, values, halves, fmt="o-", capsize=3)
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set_title(title)
    axes.set_xlabel("length of the average, relative to the training (0: the weights of the last step)")
    axes.set_ylabel("validation loss minus that of the weights")
    axes.grid(alpha=0.3)
    plots.write_figure(figure, path)


def _losses(folder: Path) -> np.ndarray:
    """[N, K] in float64: the losses by image, whose order is that of their hashes."""
    path = folder / RESULT_FILES["validation"]
    found = Results(path).arrays()
    if found is None:
        raise UserError(f"{path} is missing: run the same command again.")
    found = by_image(found)
    order = sorted(range(len(found.names)), key=found.names.__getitem__)
    return found.loss[0][order].astype(np.float64)
