"""Plots of a comparison: curves and differences with intervals, all pairs as a matrix, timestep bins, and sample grids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sushi_research.experiments.clocks import time_axis
from sushi_research.experiments.comparison import Comparison, Pair
from sushi_research.experiments.means import mean_and_error
from sushi_research.experiments.seeds import per_seed, runs_that_count
from sushi_research.experiments.variants import Variant
from sushi_research.files import write_image
from sushi_research.reports.run_record import RunRecord
from sushi_research.reports.statistics import interpolate, t_quantile
from sushi_research.sampling import plots

# The colours of Okabe and Ito (2008), distinguishable for colour-blind people; then the same colours with other line styles.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8A8A00")
STYLES = ("-", "--", ":", "-.")
LABEL = "prompt"


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(np.ravel(figure.subplots(rows, columns)))


def _line_style(number: int) -> dict[str, Any]:
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": STYLES[number // len(COLOURS) % len(STYLES)],
    }


def points(
    variant: Variant, axis: str, reference: Variant | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """(x, mean, half-width of the 95 % interval) of a variant's validation loss minus the base's or a reference's.

    The mean is over the variant's seeds. The interval is Student's t over images, so it is about these runs. The points are the
    evaluations within the range of all runs, interpolated for runs evaluated at other points (as with seconds). None if the axis
    is not known or the validation sets differ.
    """
    sides = [[run for run in runs_that_count(side.runs) if run.evaluation] for side in (variant, reference) if side]
    curves = [run.evaluation for side in sides for run in side]
    if (
        not all(sides)
        or any(curve.axis(axis) is None or (np.diff(curve.axis(axis)) <= 0).any() for curve in curves)
        or len({curve.measured_on for curve in curves}) > 1
    ):
        return None
    longest = max((run.evaluation for run in sides[0]), key=lambda curve: curve.axis(axis)[-1])
    low, high = (max(c.axis(axis)[0] for c in curves), min(c.axis(axis)[-1] for c in curves))
    if low > high:
        return None
    at = longest.axis(axis)
    at = np.unique(np.append(at[(at >= low) & (at <= high)], high))

    def over_base(run: RunRecord) -> np.ndarray:
        curve = run.evaluation
        return interpolate(curve.axis(axis), curve.loss - curve.base, at)

    means = [per_seed(side, over_base).mean(0) for side in sides]
    over = means[0] - means[1] if reference else means[0]
    mean, error = np.array([mean_and_error(loss) for loss in over]).T
    images = len(curves[0].names)
    return at, mean, error * (t_quantile(0.975, images - 1) if images > 1 else np.nan)


def validation_curves(comparison: Comparison, path: Path) -> bool:
    """Plots validation loss against samples seen and seconds of training; returns whether there was anything to plot.

    The upper row is the loss minus the base's, the lower row minus the reference's (by default the first variant's).
    """
    variants = comparison.variants
    # The named reference, else the first variant.
    first = next((pair.reference for pair in comparison.samples), None)
    if first and all(points(v, "samples", first) is None for v in variants if v is not first):
        first = None  # adapter files have no curves
    rows = 2 if first else 1
    curves = [run.evaluation for variant in variants for run in variant.runs if run.evaluation]
    axes_shown = [("samples", "samples seen"), time_axis(curves)]
    figure, panels = _figure(12, 4.6 * rows, rows, 2)
    plotted = 0
    for number, axes in enumerate(panels):
        axis, label = axes_shown[number % 2]
        reference = first if number > 1 else None
        for place, variant in enumerate(variants):
            found = points(variant, axis, reference) if variant is not reference else None
            if found is not None:
                _curve(axes, found, variant.label, place, band=len(variants) <= 6)
                plotted += 1
            elif number == 0 and variant.is_file and variant.runs[0].evaluation is not None:
                plotted += _level(axes, variant, place)
        line = _line_style(variants.index(first)) if reference else {"color": "grey"}
        axes.axhline(0, linewidth=1.5 if reference else 0.8, **line)
        axes.set_xlabel(label)
        axes.set_ylabel("validation loss, over " + (f"{reference.label}'s" if reference else "the base's"))
        axes.grid(alpha=0.3)
    if len(variants) <= 12:
        panels[0].legend(fontsize=8)
    else:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=7)
    if plotted:
        plots.write_figure(figure, path)
    return plotted > 0


def _curve(axes: Any, found: tuple[np.ndarray, np.ndarray, np.ndarray], label: str, number: int, band: bool) -> None:
    x, mean, half = found
    axes.plot(x, mean, marker="o", markersize=3, label=label, **_line_style(number))
    if band:
        axes.fill_between(x, mean - half, mean + half, color=_line_style(number)["color"], alpha=0.15, linewidth=0)


def _level(axes: Any, variant: Variant, number: int) -> int:
    """Plots a horizontal line at an adapter file's loss, as it has no curve."""
    curve = variant.runs[0].evaluation
    mean, _ = mean_and_error(curve.loss[-1] - curve.base)
    axes.axhline(mean, label=variant.label, linewidth=1.2, **_line_style(number))
    return 1


def differences(pairs: Sequence[Pair], path: Path, title: str) -> bool:
    """Plots differences of up to 30 pairs with 95 % intervals; returns whether there are any.

    Filled points are better or worse by the test result.
    """
    tested = [pair for pair in pairs if pair.outcome is not None][:30]
    if not tested:
        return False
    figure, (axes,) = _figure(10, 1.2 + 0.36 * len(tested))
    for row, pair in enumerate(tested):
        d = pair.outcome.difference
        decided = pair.outcome.outcome != "not distinguishable"
        colour = {"better": "#009E73", "worse": "#D55E00"}.get(pair.outcome.outcome, "#777777")
        axes.plot([d.low, d.high], [row, row], color=colour, linewidth=2)
        axes.plot(d.value, row, "o", color=colour, markerfacecolor=colour if decided else "white", markersize=7)
    axes.set_yticks(
        range(len(tested)), [f"{pair.candidate.label} - {pair.reference.label}" for pair in tested], fontsize=8
    )
    axes.set_ylim(len(tested) - 0.5, -0.5)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel("difference in validation loss (left: the first named is better)")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3, axis="x")
    plots.write_figure(figure, path)
    return True


def matrix(comparison: Comparison, path: Path) -> bool:
    """Plots each pair as a cell: the row's variant is better (green) or worse (orange) than the column's, or not
    distinguishable (grey). Returns whether there are any."""
    variants = comparison.variants
    place = {variant.label: number for number, variant in enumerate(variants)}
    values = np.full((len(variants), len(variants)), np.nan)
    for pair in comparison.samples:
        if pair.outcome is not None:
            value = {"better": 1.0, "worse": -1.0}.get(pair.outcome.outcome, 0.0)
            row, column = place[pair.candidate.label], place[pair.reference.label]
            values[row, column], values[column, row] = value, -value
    if np.isnan(values).all():
        return False
    from matplotlib.colors import ListedColormap

    side = 2.5 + 0.28 * len(variants)
    figure, (axes,) = _figure(side + 1, side)
    axes.imshow(values, cmap=ListedColormap(["#D55E00", "#E8E8E8", "#009E73"]), vmin=-1, vmax=1)
    labels = [variant.label for variant in variants]
    axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=7)
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.set_title("the row's variant is better (green), worse (orange), not distinguishable (grey)", fontsize=9)
    plots.write_figure(figure, path)
    return True


def timestep_bins(comparison: Comparison, path: Path) -> bool:
    """Plots validation loss minus the base's by timestep bin, at the last evaluation, with 95 % intervals over images."""
    figure, (axes,) = _figure(9, 4.2)
    plotted, count = 0, max(1, len(comparison.variants))
    for number, variant in enumerate(comparison.variants):
        runs = [run for run in runs_that_count(variant.runs) if run.evaluation is not None]
        if not runs or len({run.evaluation.measured_on for run in runs}) > 1:
            continue
        mean, half = bin_means(runs)
        x = np.arange(4) + (number - (count - 1) / 2) * 0.7 / count
        axes.errorbar(
            x, mean, half, fmt="o", capsize=2, markersize=4, label=variant.label, color=_line_style(number)["color"]
        )
        plotted += 1
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set_xticks(range(4), [f"t {250 * timestep_bin}-{250 * timestep_bin + 249}" for timestep_bin in range(4)])
    axes.set_ylabel("validation loss, over the base's")
    axes.grid(alpha=0.3, axis="y")
    if plotted and count <= 12:
        axes.legend(fontsize=8)
    if plotted:
        plots.write_figure(figure, path)
    return plotted > 0


def bin_means(runs: Sequence[RunRecord]) -> tuple[np.ndarray, np.ndarray]:
    """(means [4], half-widths [4]) of the loss minus the base's at the last evaluation, by timestep bin, averaged over seeds."""
    over_base = per_seed(runs, lambda run: run.evaluation.loss[-1].astype(np.float64) - run.evaluation.base).mean(0)
    bins = runs[0].evaluation.timesteps.astype(int) * 4 // 1000
    found = []
    for timestep_bin in range(4):
        # With fewer noise samples than bins, an image may have none in this one.
        used = bins == timestep_bin
        images = np.array([row[those].mean() for row, those in zip(over_base, used, strict=True) if those.any()])
        factor = t_quantile(0.975, len(images) - 1) if len(images) > 1 else np.nan
        half = factor * images.std(ddof=1) / len(images) ** 0.5 if len(images) > 1 else np.nan
        found.append((images.mean() if len(images) else np.nan, half))
    mean, half = np.array(found).T
    return mean, half


def samples(comparison: Comparison, path: Path) -> bool:
    """Saves a grid of samples of the base and of each variant's first run at its last sampled step, for common prompts and seeds.

    Returns whether there are any.
    """
    columns: dict[str, dict[str, Path]] = {}
    for variant in comparison.variants[:12]:
        first, last = _sample_images(variant.runs[0], comparison.problems)
        if last:
            columns.setdefault("base", first)
            columns[variant.label] = last
    if len(columns) < 2:
        return False
    # The base's images are a run's samples at step 0; without those the base has no column.
    columns = {name: images for name, images in columns.items() if images}
    common = [label for label in next(iter(columns.values())) if all(label in images for images in columns.values())]
    if not common:
        return False
    cells = []
    for label in common[:12]:
        cells.append([])
        for images in columns.values():
            with Image.open(images[label]) as image:
                cells[-1].append(image.convert("RGB"))
    write_image(path, plots.grid(cells, common[:12], list(columns)))
    return True


def _sample_images(run: RunRecord, problems: list[str]) -> tuple[dict[str, Path], dict[str, Path]]:
    """(label -> image file) at step 0 and at the last sampled step; labels contain the prompt and, with several seeds, the seed."""
    folders = (run.path / "samples").glob("step-*")
    steps = sorted(folder for folder in folders if folder.name[5:].isdecimal() and folder.is_dir())
    found = []
    for step in (steps[:1] if steps and int(steps[0].name[5:]) == 0 else [], steps[-1:]):
        labels = {}
        for file in sorted(path for folder in step for path in folder.glob("*.png")):
            if problem := plots.picture_problem(file):
                problems.append(f"{file} is not an image (it {problem}): it is skipped")
                continue
            with Image.open(file) as image:
                labels[f"{image.info.get(LABEL, file.stem)} [{file.stem[3:]}]"] = file
        found.append(labels)
    return found[0], found[1]
