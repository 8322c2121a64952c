"""A learning-rate range test: how the loss changes while the rate rises exponentially, against the base on the same noise.

Each step's loss is divided by that of a run that learns nothing and has the same samples, noise and timesteps in each step. Most of
what makes losses of single steps scatter is in both, so the curve is smooth enough after 100 steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sushi_research.sampling import plots

# Steps over which the curve is smoothed (the standard deviation of the kernel): a fifth of a decade in a test of 20 a decade.
WIDTH = 4.0
# A test ends when the loss has been so many times that of the base for so many steps in a row.
DIVERGED, IN_A_ROW = 2.0, 3
# A fall counts from so many standard errors on, because the lowest of a hundred points is looked at.
ERRORS = 4.0


@dataclass(frozen=True)
class Curve:
    """By step, [n] each: the `rates`, `changes` = loss / the base's loss - 1, and these `smooth`, with their standard `errors`.

    `has_ended`: whether the test ended before its highest rate, as it does where the loss is far above the base's, or not finite.
    """

    rates: np.ndarray
    changes: np.ndarray
    smooth: np.ndarray
    errors: np.ndarray
    has_ended: bool = False

    @property
    def rises(self) -> bool:
        """Whether the loss is above the base's at the last rate, or ended the test."""
        return self.has_ended or (len(self.rates) > 0 and self.smooth[-1] > ERRORS * self.errors[-1])


@dataclass(frozen=True)
class Suggestion:
    """What a curve says. Rates are None where it does not say it.

    `falls`: the smallest rate from which on the loss has a tenth of its largest fall. `lowest`: the rate at which it is lowest.
    `rises`: the smallest rate above it at which half of the fall is lost. `still_falling`: the highest rate was the best.
    """

    falls: float | None = None
    lowest: float | None = None
    rises: float | None = None
    still_falling: bool = False

    @property
    def range(self) -> tuple[float, float] | None:
        """The rates to try: from a tenth to half of that at which the loss is lowest."""
        return None if self.lowest is None or self.still_falling else (self.lowest / 10, self.lowest / 2)


def has_diverged(losses: Mapping[int, float], base: Mapping[int, float]) -> bool:
    """Whether the last steps' losses, by step, are far above those of the base."""
    last = sorted(losses)[-IN_A_ROW:]
    return len(last) == IN_A_ROW and all(losses[step] > DIVERGED * base.get(step, math.inf) for step in last)


def curve_of(
    rates: Mapping[int, float], losses: Mapping[int, float], base: Mapping[int, float], *, has_ended: bool = False
) -> Curve:
    """The curve of the steps that all three have, by step. Steps without a positive loss of the base are left out."""
    steps = [step for step in sorted(losses) if base.get(step, 0) > 0]
    of_base = np.array([base[step] for step in steps])
    changes = np.array([losses[step] / base[step] - 1 for step in steps])
    # What has diverged would pull the smooth curve up before it does.
    smooth, errors = smoothed(np.minimum(changes, DIVERGED - 1), of_base)
    return Curve(np.array([rates[step] for step in steps]), changes, smooth, errors, has_ended)


def smoothed(values: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(a locally linear fit at each point with a Gaussian kernel of WIDTH and `weights`, its standard errors), [n] all.

    With the base's losses as weights a fit of changes is the change of the sum: steps with small losses count little. The errors
    follow from the residuals of the steps around a point; the larger its weight, the less a step scatters.
    """
    count = len(values)
    if count < 3:
        return values.copy(), np.zeros(count)
    places = np.arange(count)
    distances = places[None] - places[:, None]  # [point, step]
    kernel = np.exp(-0.5 * (distances / WIDTH) ** 2) * weights
    design = np.stack([np.ones_like(distances), distances], axis=1)  # [point, 2, step]
    weighted = design * kernel[:, None]
    # The fit at a point is a sum of the values with these weights, [point, step].
    rows = np.linalg.solve(weighted @ design.transpose(0, 2, 1), weighted)[:, 0]
    smooth = rows @ values
    own = np.diagonal(rows)  # of a point itself, whose residual the fit makes smaller
    residuals = (values - smooth) / np.maximum(1 - own, 0.1)
    wider = np.exp(-0.5 * (distances / (2 * WIDTH)) ** 2)
    variances = wider @ (weights * residuals**2) / wider.sum(axis=1)  # of a step whose weight is 1
    return smooth, np.sqrt((rows**2 / weights).sum(axis=1) * variances)


def suggestion_of(curve: Curve) -> Suggestion:
    """What the curve says, if the loss falls by more than its scatter."""
    if not len(curve.rates):
        return Suggestion()
    lowest = int(np.argmin(curve.smooth))
    if curve.smooth[lowest] >= -ERRORS * curve.errors[lowest]:
        return Suggestion()
    falls = lowest
    while falls > 0 and curve.smooth[falls - 1] < curve.smooth[lowest] / 10:
        falls -= 1
    above = [n for n in range(lowest, len(curve.rates)) if curve.smooth[n] > curve.smooth[lowest] / 2]
    return Suggestion(
        falls=float(curve.rates[falls]),
        lowest=float(curve.rates[lowest]),
        rises=float(curve.rates[above[0]]) if above else None,
        still_falling=lowest == len(curve.rates) - 1 and not curve.has_ended,
    )


def describe(curve: Curve, found: Suggestion) -> list[str]:
    """The result as lines for the terminal."""
    tested = f"{curve.rates[0]:.2g} to {curve.rates[-1]:.2g}" if len(curve.rates) else "nothing"
    if found.falls is None:
        others = "lower" if curve.rises else "higher"
        return [
            f"the loss does not fall below the base's by more than its scatter ({tested}): test {others} rates, or more steps"
        ]
    change = -float(curve.smooth.min())
    lines = [
        f"the loss falls from {found.falls:.2g} on (a tenth of its fall), and is lowest at {found.lowest:.2g}: {change:.1%} below "
        "the base's"
    ]
    lines += [f"from {found.rises:.2g} on, half of that is lost"] if found.rises else []
    lines += [f"above {curve.rates[-1]:.2g} it is far above the base's, or not finite"] if curve.has_ended else []
    if found.range is None:
        return [*lines, f"it was still falling at the highest rate ({tested}): test higher ones"]
    low, high = found.range
    return [
        *lines,
        f"try optimizer.lr from {low:.2g} to {high:.2g}, a tenth to half of the rate at which the loss is lowest",
    ]


def picture(curve: Curve, found: Suggestion, title: str) -> bytes:
    """A PNG of the curve and of the rates to try."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    share, smooth, errors = (100 * values for values in (curve.changes, curve.smooth, curve.errors))
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.plot(curve.rates, share, ".", markersize=4, color="tab:blue", alpha=0.4, label="each step")
    axes.plot(curve.rates, smooth, color="tab:blue", label="smoothed")
    axes.fill_between(curve.rates, smooth - 2 * errors, smooth + 2 * errors, alpha=0.2, color="tab:blue")
    if found.range is not None:
        axes.axvspan(
            *found.range, color="tab:green", alpha=0.15, label=f"to try: {found.range[0]:.2g} to {found.range[1]:.2g}"
        )
    depth = max(1.0, -float(smooth.min())) if len(smooth) else 1.0
    axes.set(xscale="log", ylim=(-2 * depth, 4 * depth), xlabel="optimizer.lr", ylabel="loss over the base's, %")
    axes.set_title(title, fontsize=11)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")
    return plots.figure_png(figure)


def by_step(records: Sequence[Mapping[str, object]], key: str) -> dict[int, float]:
    """The values of a metric by step."""
    return {record["step"]: record[key] for record in records if record.get(key) is not None}  # type: ignore[index,misc]
