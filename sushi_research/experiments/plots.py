"""Plots of a comparison: learned against kept, curves and differences with intervals, all pairs as a matrix, timestep bins."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sushi_research.evaluation.outcomes import log_ratio
from sushi_research.experiments.clocks import time_axis
from sushi_research.experiments.comparison import Comparison
from sushi_research.experiments.means import mean_and_error
from sushi_research.experiments.pairs import Pair
from sushi_research.experiments.seeds import per_seed, runs_that_count
from sushi_research.experiments.variants import Variant
from sushi_research.reports.outcome_tests import OUTCOMES, values_of
from sushi_research.reports.run_record import RunRecord
from sushi_research.reports.statistics import interpolate, t_quantile
from sushi_research.sampling import plots

# The colours of Okabe and Ito (2008), distinguishable for colour-blind people; then the same colours with other line styles.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8A8A00")
STYLES = ("-", "--", ":", "-.")


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
    """(x, mean, half-width of the 95 % interval) of what a variant learned, minus what a reference learned if one is given.

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
        or any(values_of("evaluation", curve) is None for curve in curves)
    ):
        return None
    longest = max((run.evaluation for run in sides[0]), key=lambda curve: curve.axis(axis)[-1])
    low, high = (max(c.axis(axis)[0] for c in curves), min(c.axis(axis)[-1] for c in curves))
    if low > high:
        return None
    at = longest.axis(axis)
    at = np.unique(np.append(at[(at >= low) & (at <= high)], high))

    def learned(run: RunRecord) -> np.ndarray:
        return interpolate(run.evaluation.axis(axis), values_of("evaluation", run.evaluation), at)

    means = [per_seed(side, learned).mean(0) for side in sides]
    over = means[0] - means[1] if reference else means[0]
    mean, error = np.array([mean_and_error(loss) for loss in over]).T
    images = len(curves[0].names)
    return at, mean, error * (t_quantile(0.975, images - 1) if images > 1 else np.nan)


def validation_curves(comparison: Comparison, path: Path) -> bool:
    """Plots what was learned against samples seen and seconds of training; returns whether there was anything to plot.

    The upper row is the log of the loss over the base's, the lower row minus the reference's (by default the first variant's).
    """
    variants = comparison.variants
    # The named reference, else the first variant.
    first = next((pair.reference for pair in comparison.learned), None)
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
        axes.set_ylabel(
            f"learned, minus {reference.label}'s" if reference else "learned: log of the loss over the base's"
        )
        axes.grid(alpha=0.3)
    if not plotted:
        return False
    _legend(figure, panels[0], len(variants))
    plots.write_figure(figure, path)
    return True


def _legend(figure: Any, axes: Any, count: int, place: str = "best") -> None:
    """Names the variants, below the figure if there are many."""
    if count <= 12:
        axes.legend(fontsize=8, loc=place)
    else:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=7)


def _curve(axes: Any, found: tuple[np.ndarray, np.ndarray, np.ndarray], label: str, number: int, band: bool) -> None:
    x, mean, half = found
    axes.plot(x, mean, marker="o", markersize=3, label=label, **_line_style(number))
    if band:
        axes.fill_between(x, mean - half, mean + half, color=_line_style(number)["color"], alpha=0.15, linewidth=0)


def _level(axes: Any, variant: Variant, number: int) -> int:
    """Plots a horizontal line at what an adapter file learned, as it has no curve."""
    values = values_of("evaluation", variant.runs[0].evaluation)
    if values is None:
        return 0
    mean, _ = mean_and_error(values[-1])
    axes.axhline(mean, label=variant.label, linewidth=1.2, **_line_style(number))
    return 1


def differences(comparison: Comparison, path: Path) -> bool:
    """Plots differences of up to 30 pairs in what they learned and kept, with 95 % intervals; returns whether there are any.

    Filled points are distinguishable by the test result.
    """
    columns = [(OUTCOMES[kind].name, comparison.outcomes[kind]) for kind in ("evaluation", "base_images")]
    columns = [(name, pairs[:30]) for name, pairs in columns if any(pair.outcome is not None for pair in pairs[:30])]
    if not columns:
        return False
    shown = columns[0][1]
    figure, panels = _figure(6 + 5 * len(columns), 1.4 + 0.36 * len(shown), 1, len(columns))
    for axes, (name, pairs) in zip(panels, columns, strict=True):
        for row, pair in enumerate(pairs):
            if pair.outcome is not None:
                _difference(axes, row, pair)
        labels = [f"{pair.candidate.label} - {pair.reference.label}" for pair in pairs]
        axes.set_yticks(range(len(pairs)), labels if axes is panels[0] else [], fontsize=8)
        axes.set_ylim(len(pairs) - 0.5, -0.5)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_xlabel(f"{name}: difference in log loss (left: the first named {name} more)")
        axes.grid(alpha=0.3, axis="x")
    plots.write_figure(figure, path)
    return True


def _difference(axes: Any, row: int, pair: Pair) -> None:
    d = pair.outcome.difference
    decided = pair.outcome.outcome != "not distinguishable"
    colour = {"better": "#009E73", "worse": "#D55E00"}.get(pair.outcome.outcome, "#777777")
    axes.plot([d.low, d.high], [row, row], color=colour, linewidth=2)
    axes.plot(d.value, row, "o", color=colour, markerfacecolor=colour if decided else "white", markersize=7)


def trade_off(comparison: Comparison, path: Path) -> bool:
    """Plots kept against learned: one point for each run and evaluated step, with 95 % intervals over images and captions, joined
    by lines, and the base at the origin. Returns whether any run has both."""
    figure, (axes,) = _figure(8.5, 6.5)
    plotted = 0
    for number, variant in enumerate(comparison.variants):
        label: str | None = variant.label  # of the first run that is drawn
        for run in variant.runs:
            found = trade_off_points(run)
            if len(found) == 0:
                continue
            _, learned, learned_half, kept, kept_half = found.T
            style = _line_style(number)
            axes.plot(learned, kept, label=label, linewidth=1, **style)
            label = None
            # The last point is larger; with many runs only it has its intervals.
            shown = slice(None) if len(comparison.variants) <= 6 else slice(-1, None)
            halves = {"xerr": learned_half[shown], "yerr": kept_half[shown]}
            axes.errorbar(
                learned[shown], kept[shown], **halves, fmt="o", markersize=3, linewidth=0.7, color=style["color"]
            )
            axes.plot(learned[-1], kept[-1], "o", markersize=7, color=style["color"])
            plotted += 1
    if not plotted:
        return False
    axes.plot(0, 0, "*", markersize=14, color="black", label="base", zorder=3)
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.axvline(0, color="grey", linewidth=0.8)
    # To the right: learned more; upwards: kept more.
    axes.invert_xaxis()
    axes.invert_yaxis()
    axes.set_xlabel("learned: log of the loss over the base's on held-out images (right: learned more)")
    axes.set_ylabel("kept: log of the loss over the base's on the base's own pictures (down: lost)")
    axes.grid(alpha=0.3)
    _legend(figure, axes, len(comparison.variants), "lower left")
    plots.write_figure(figure, path)
    return True


def trade_off_points(run: RunRecord) -> np.ndarray:
    """[steps, 5] of a run: step, learned and its half-width, kept and its half-width (95 % intervals, Student's t), at the steps
    that have both. Half-widths of a single image or caption are NaN."""
    learned, kept = (run.curves[kind] if kind in run.curves else None for kind in ("evaluation", "base_images"))
    values = [values_of(kind, curve) for kind, curve in (("evaluation", learned), ("base_images", kept)) if curve]
    if len(values) < 2 or any(each is None for each in values):
        return np.empty((0, 5))
    found = []
    for step in learned.steps:
        if step in kept.steps:
            parts = [
                _with_half(each[curve.steps.index(step)]) for each, curve in zip(values, (learned, kept), strict=True)
            ]
            found.append((step, *parts[0], *parts[1]))
    return np.array(found).reshape(-1, 5)


def _with_half(values: np.ndarray) -> tuple[float, float]:
    """(mean, half-width of the 95 % interval) of [N, K]."""
    mean, error = mean_and_error(values)
    return mean, error * t_quantile(0.975, len(values) - 1) if len(values) > 1 else np.nan


def matrix(comparison: Comparison, path: Path) -> bool:
    """Plots each pair as a cell: the row's variant is better (green) or worse (orange) than the column's, a trade-off (blue), or
    none of them (grey). Returns whether there are any."""
    variants = comparison.variants
    place = {variant.label: number for number, variant in enumerate(variants)}
    values = np.full((len(variants), len(variants)), np.nan)
    for pair, result in comparison.decided:
        row, column = place[pair.candidate.label], place[pair.reference.label]
        value = {"worse": 0.0, "better": 2.0, "trade-off": 3.0}.get(result.word, 1.0)
        values[row, column], values[column, row] = value, {0.0: 2.0, 2.0: 0.0}.get(value, value)
    if np.isnan(values).all():
        return False
    from matplotlib.colors import ListedColormap

    side = 2.5 + 0.28 * len(variants)
    figure, (axes,) = _figure(side + 1, side)
    axes.imshow(values, cmap=ListedColormap(["#D55E00", "#E8E8E8", "#009E73", "#56B4E9"]), vmin=0, vmax=3)
    labels = [variant.label for variant in variants]
    axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=7)
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.set_title(
        "the row's variant is better (green), worse (orange), a trade-off (blue), undecided (grey)", fontsize=9
    )
    plots.write_figure(figure, path)
    return True


def timestep_bins(comparison: Comparison, path: Path) -> bool:
    """Plots the log of the loss over the base's by timestep bin, at the last evaluation, with 95 % intervals over images."""
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
    axes.set_ylabel("log of the loss over the base's")
    axes.grid(alpha=0.3, axis="y")
    if plotted and count <= 12:
        axes.legend(fontsize=8)
    if plotted:
        plots.write_figure(figure, path)
    return plotted > 0


def bin_means(runs: Sequence[RunRecord]) -> tuple[np.ndarray, np.ndarray]:
    """(means [4], half-widths [4]) of the log loss over the base's at the last evaluation, by timestep bin, over seeds."""
    over_base = per_seed(runs, lambda run: log_ratio(run.evaluation.loss[-1], run.evaluation.base)).mean(0)
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
