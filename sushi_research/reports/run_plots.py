"""The panels of a run's page about its evaluations: learned against kept, and each outcome over the steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sushi_research.reports.statistics import t_quantile
from sushi_research.reports.training_curves import panel


@dataclass(frozen=True)
class StepMeans:
    """The mean over `units` of an outcome at T steps, [T] each: NaN where it was not measured or is not finite.

    `low` and `high` are the 95 % interval over units; NaN with one unit only.
    """

    name: str
    mean: np.ndarray
    error: np.ndarray
    low: np.ndarray
    high: np.ndarray


def means_of(name: str, values: np.ndarray) -> StepMeans:
    """The means of [T, units], with Student's t over units."""
    units = values.shape[1]
    mean = values.mean(1)
    error = values.std(1, ddof=1) / units**0.5 if units > 1 else np.full(len(values), np.nan)
    half = error * t_quantile(0.975, units - 1) if units > 1 else error
    return StepMeans(name, mean, error, mean - half, mean + half)


def outcome_panels(
    steps: Sequence[int], best: int | None, pair: tuple[StepMeans, StepMeans] | None, groups: dict[str, list[StepMeans]]
) -> dict[str, bytes]:
    """PNG files by title: the pair (kept, learned) against each other, one point per step, and each group over the steps.

    With 95 % intervals; the `best` step is marked. {} if there is nothing to plot, such as of one step.
    """
    if len(steps) < 2:
        return {}
    draw: dict[str, Callable[[Any], None]] = {}
    if pair and np.isfinite(pair[0].mean + pair[1].mean).any():
        draw["learned against kept, one point per step"] = lambda axes: _against_each_other(axes, steps, best, *pair)
    for title, group in groups.items():
        if shown := [each for each in group if np.isfinite(each.mean).any()]:
            draw[title] = lambda axes, title=title, shown=shown: _over_steps(axes, steps, best, title, shown)
    return {title: panel(title, function) for title, function in draw.items()}


def _against_each_other(axes: Any, steps: Sequence[int], best: int | None, kept: StepMeans, learned: StepMeans) -> None:
    """To the right: learned more; upwards: kept more, as on the page of a comparison."""
    axes.plot(learned.mean, kept.mean, color="lightgrey", zorder=1)
    axes.errorbar(
        learned.mean, kept.mean, _bars(kept), _bars(learned), fmt="o", markersize=4, linewidth=0.8, color="tab:blue"
    )
    for step, x, y in zip(steps, learned.mean, kept.mean, strict=True):
        if step == best:
            axes.plot(x, y, "o", markersize=11, fillstyle="none", color="black", label=f"best: step {step}")
            axes.legend(fontsize=8)
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.axvline(0, color="grey", linewidth=0.8)
    axes.margins(0.08)
    axes.invert_xaxis()
    axes.invert_yaxis()
    axes.set_xlabel("learned (right: learned more)", fontsize=9)
    axes.set_ylabel("kept (down: lost)", fontsize=9)
    _name_points(axes, steps, np.stack([learned.mean, kept.mean], axis=1))


def _name_points(axes: Any, steps: Sequence[int], points: np.ndarray) -> None:
    """Writes the steps next to their points [T, 2]; one text for points that are next to each other."""
    near: list[tuple[np.ndarray, list[int]]] = []
    for number, pixels in enumerate(axes.transData.transform(points)):
        if np.isfinite(pixels).all():
            group = next((each for at, each in near if np.abs(pixels - at).max() < 20), None)
            if group is None:
                near.append((pixels, [number]))
            else:
                group.append(number)
    for _, group in near:
        text = ", ".join(str(steps[number]) for number in group[:3]) + (f" .. {steps[group[-1]]}" if group[3:] else "")
        axes.annotate(text, points[group[0]], textcoords="offset points", xytext=(6, 5), fontsize=8)


def _over_steps(axes: Any, steps: Sequence[int], best: int | None, title: str, group: Sequence[StepMeans]) -> None:
    for each in group:
        axes.errorbar(steps, each.mean, _bars(each), marker="o", markersize=3, capsize=2, linewidth=1, label=each.name)
    axes.axhline(0.5 if "AUC" in title else 0, color="grey", linewidth=0.8)
    if best is not None:
        axes.axvline(best, color="black", linewidth=0.8, linestyle="--", label="best step" if len(group) > 1 else None)
    if len(group) > 1:
        axes.legend(fontsize=8)


def _bars(means: StepMeans) -> np.ndarray:
    """[2, T]: how far the interval reaches below and above the mean; 0 where it is not known."""
    return np.nan_to_num(np.stack([means.mean - means.low, means.high - means.mean])).clip(0)
