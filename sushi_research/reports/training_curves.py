"""The curves of a run, from metrics.jsonl: one panel each for the page, and all of them in loss.png."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from sushi_research.errors import printable
from sushi_research.files import write_image
from sushi_research.runs import metrics_gaps
from sushi_research.sampling import plots

# Of each panel, in inches and pixels per inch: text of 10 points can be read on a phone, whose screen is as wide as a panel.
PANEL_SIZE, DPI = (5.0, 3.3), 110
# A curve has at most so many points for each panel: more than its pixels only cost time.
MOST_POINTS = 2000
SMOOTHING = 0.95

Points = tuple[list[int], list[float]]


def panels(records: Sequence[dict[str, Any]]) -> dict[str, bytes]:
    """PNG files by title: loss (raw and smoothed), loss by timestep bin, learning rate and gradient norm.

    Curves have a gap where `records` mark that lines are missing (metrics_gaps.py). If the run was evaluated, also the validation
    loss minus the base's and the drift, with bands of two standard errors. A panel without a value is left out.
    """
    trained = [record for record in records if metrics_gaps.is_trained(record) or metrics_gaps.MARK in record]
    curves: dict[str, tuple[Callable[[Any], None], Sequence[str]]] = {
        "loss": (lambda axes: _loss(axes, trained), ["loss"]),
        f"loss by timestep, {_SMOOTHED}": (lambda axes: _by_timestep(axes, trained), _BY_TIMESTEP),
        "learning rate": (lambda axes: axes.plot(*thinned(*points(trained, "lr"))), ["lr"]),
        "gradient norm": (
            lambda axes: axes.plot(*thinned(*points(trained, "grad_norm")), linewidth=0.8),
            ["grad_norm"],
        ),
    }
    # All lines of a run may be lost, and older versions did not write every value.
    known = {name for record in trained for name, value in record.items() if value is not None}
    draw = {title: function for title, (function, names) in curves.items() if not known.isdisjoint(names)}
    evaluated = {
        "validation loss, over the base's": "evaluation/loss_over_base",
        "drift from the base": "evaluation/drift",
    }
    for title, name in evaluated.items():
        found = [record for record in records if record.get(name) is not None]
        if len(found) > 1:  # one point is no curve
            draw[f"{title} (+- 2 standard errors)"] = lambda axes, found=found, name=name: _with_band(axes, found, name)
    return {title: panel(title, function) for title, function in draw.items()}


def write(drawn: dict[str, bytes], path: Path, title: str) -> None:
    """Writes the panels as one picture, two in a row. CannotWrite if that fails."""
    images = [Image.open(io.BytesIO(data)).convert("RGB") for data in drawn.values()]
    heading = _heading(title)
    height = max((image.height for image in images), default=0)
    canvas = Image.new("RGB", (heading.width, heading.height + -(-len(images) // 2) * height), "white")
    canvas.paste(heading, (0, 0))
    for number, image in enumerate(images):
        canvas.paste(image, (number % 2 * heading.width // 2, heading.height + number // 2 * height))
    write_image(path, canvas)


_BY_TIMESTEP = [f"loss_by_timestep/{timestep_bin}" for timestep_bin in range(4)]
_SMOOTHED = f"smoothed (moving average, factor {SMOOTHING:g})"


def _loss(axes: Any, records: Sequence[dict[str, Any]]) -> None:
    steps, raw = points(records, "loss")
    axes.plot(*thinned(steps, raw), color="lightsteelblue", linewidth=0.8, label="each step")
    axes.plot(*thinned(steps, smooth(raw)), color="tab:blue", label=_SMOOTHED)
    axes.legend(fontsize=8)


def _by_timestep(axes: Any, records: Sequence[dict[str, Any]]) -> None:
    for timestep_bin, name in enumerate(_BY_TIMESTEP):
        steps, values = points(records, name)
        axes.plot(*thinned(steps, smooth(values)), label=f"t {250 * timestep_bin}-{250 * timestep_bin + 249}")
    axes.legend(fontsize=8, ncols=2)


def panel(title: str, draw: Callable[[Any], None]) -> bytes:
    """A PNG file of one panel, which `draw` draws on its axes."""
    figure = _figure(PANEL_SIZE)
    axes = figure.add_axes((0.15, 0.15, 0.82, 0.73))
    axes.set_xlabel("optimizer step", fontsize=9)
    draw(axes)
    axes.set_title(textwrap.fill(title, 56), fontsize=10)
    axes.tick_params(labelsize=9)
    axes.grid(alpha=0.3)
    return plots.figure_png(figure)


def _heading(title: str) -> Image.Image:
    figure = _figure((2 * PANEL_SIZE[0], 0.4))
    figure.text(0.5, 0.35, printable(title), fontsize=12, ha="center")
    return plots.figure_image(figure).convert("RGB")


def _figure(size: tuple[float, float]) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size)
    FigureCanvasAgg(figure)
    return figure


def _with_band(axes: Any, records: Sequence[dict[str, Any]], name: str) -> None:
    """Plots a curve of evaluations with a band of two standard errors (if they are known)."""
    steps, values = [record["step"] for record in records], [record[name] for record in records]
    errors = [2 * (record.get(f"{name}_se") or 0.0) for record in records]
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.plot(steps, values, marker="o", markersize=3)
    low, high = zip(*[(v - e, v + e) for v, e in zip(values, errors, strict=True)], strict=True)
    axes.fill_between(steps, low, high, alpha=0.2)


def points(records: Sequence[dict[str, Any]], name: str) -> Points:
    """(steps, values) of `name`, without steps that have none: a timestep bin may be empty, or a norm not finite.

    A mark of missing lines is a NaN, which interrupts a curve.
    """
    found = [
        (record["step"], math.nan if metrics_gaps.MARK in record else record[name])
        for record in records
        if metrics_gaps.MARK in record or record.get(name) is not None
    ]
    return [step for step, _ in found], [value for _, value in found]


def thinned(steps: Sequence[int], values: Sequence[float]) -> Points:
    """At most MOST_POINTS of the points, evenly spaced, with the first, the last and all gaps."""
    count = len(steps)
    if count <= MOST_POINTS:
        return list(steps), list(values)
    chosen = {round(place * (count - 1) / (MOST_POINTS - 1)) for place in range(MOST_POINTS)}
    chosen |= {place for place, value in enumerate(values) if math.isnan(value)}
    places = sorted(chosen)
    return [steps[place] for place in places], [values[place] for place in places]


def smooth(values: Sequence[float], factor: float = SMOOTHING) -> list[float]:
    """Exponential moving average with Adam's bias correction at the start. A NaN stays one and does not count."""
    smoothed, average, count = [], 0.0, 0
    for value in values:
        if math.isnan(value):
            smoothed.append(value)
            continue
        count += 1
        average = factor * average + (1 - factor) * value
        smoothed.append(average / (1 - factor**count))
    return smoothed
