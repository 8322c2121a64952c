"""Plots of the study: measures against scores, one point per adapter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from demo.study.candidates import IN_USE
from demo.study.results import Measured
from sushi_research.experiments.plots import COLOURS
from sushi_research.files import write_image


def scatter(studied: dict[str, list[Measured]], path: Path) -> None:
    """A column for each setting; a row for each measure in use, against its score of 32. Colours are recipes.

    Adapters that have collapsed (kept at most 1, losses above the base's) are left out: they would be far to the right.
    """
    rows = [("learned", "mse"), *((kind, name) for kind, names in IN_USE.items() for name in names)]
    figure = Figure(figsize=(3.2 * len(studied), 2.5 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = np.atleast_2d(figure.subplots(len(rows), len(studied), squeeze=False))
    recipes = list(dict.fromkeys(adapter.recipe for adapters in studied.values() for adapter in adapters))
    for column, (setting, adapters) in enumerate(studied.items()):
        for row, (kind, name) in enumerate(rows):
            axis = axes[row, column]
            for number, recipe in enumerate(recipes):
                these = [adapter for adapter in adapters if adapter.recipe == recipe]
                shown = [adapter for adapter in these if not has_collapsed(adapter)]
                x = [value_of(adapter, kind, name) for adapter in shown]
                y = [adapter.concept if kind == "learned" else adapter.kept for adapter in shown]
                axis.plot(x, y, "o-", color=COLOURS[number % len(COLOURS)], linewidth=0.7, markersize=4, label=recipe)
            axis.set(ylim=(-1, 33), xlabel=f"{kind}: {name}")
            axis.xaxis.label.set_size(7)
            axis.tick_params(labelsize=7)
            if row == 0:
                axis.set_title(setting)
            if column == 0:
                axis.set_ylabel("concept of 32" if kind == "learned" else "kept of 32", fontsize=8)
    axes[0, 0].legend(fontsize=6)
    figure.canvas.draw()
    write_image(path, Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3]))


def has_collapsed(adapter: Measured) -> bool:
    """Whether an adapter's losses on held-out images are above the base's and nothing was kept."""
    return adapter.kept <= 1 and bool(adapter.learned["log, t >= 750"].mean() > 0)


def value_of(adapter: Measured, kind: str, name: str) -> float:
    """The mean of a measure."""
    return float((adapter.learned if kind == "learned" else adapter.kept_measures)[name].mean())
