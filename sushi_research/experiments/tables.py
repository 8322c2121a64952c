"""The tables of a comparison page without test results: settings, speed and memory, seconds by stage, and the runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import numpy as np

from sushi_research.experiments.clocks import clocks_of
from sushi_research.experiments.comparison import Comparison
from sushi_research.experiments.means import mean_with_error
from sushi_research.reports.page import Block


def settings(comparison: Comparison) -> list[Block]:
    if not comparison.differing:
        return [Block("text", "No recorded setting.")]
    head = ["", *(variant.label for variant in comparison.variants)]
    rows = [[key, *map(_value, values)] for key, values in comparison.differing.items()]
    # More than six variants become rows, not columns.
    if len(comparison.variants) > 6:
        return [Block("table", rows=[list(row) for row in zip(head, *rows, strict=True)])]
    return [Block("table", rows=[head, *rows])]


def _value(value: Any) -> str:
    text = "-" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:24]}...{text[-12:]}"


def speed(comparison: Comparison) -> list[list[str]]:
    head = ["", "images/s", "waiting for data", "memory, GiB", "training, s", "by", "wall clock, s"]
    rows = [[*head, "device", "processes", "precision"]]
    for variant in comparison.variants:
        trained = [record for run in variant.runs for record in run.trained]
        if not trained:
            continue
        entry = variant.runs[0].entry
        curves = [run.evaluation for run in variant.runs if run.evaluation and run.evaluation.seconds is not None]
        clocks = clocks_of(curves)
        rows.append(
            [
                variant.label,
                f"{median(record['images_per_second'] for record in trained):.3g}",
                _of(median, trained, "data_wait_share", ".1%"),
                _of(max, trained, "peak_memory_gib", ".2f"),
                f"{median(curve.seconds[-1] for curve in curves):.1f}" if len(clocks) == 1 else "-",
                " and ".join(clocks) or "-",
                f"{median(curve.times.wall_seconds[-1] for curve in curves):.1f}" if curves else "-",
                str(entry.get("device", "-")),
                str(entry.get("world", "-")),
                str(entry.get("precision", "-")),
            ]
        )
    return rows


def _of(reduce: Callable[[list[float]], float], lines: Sequence[dict[str, Any]], key: str, form: str) -> str:
    """`reduce` over the lines that have a value of `key`, formatted; "-" if none has."""
    known = [line[key] for line in lines if isinstance(line.get(key), int | float)]
    return format(reduce(known), form) if known else "-"


def stage_timings(comparison: Comparison) -> list[Block]:
    """Seconds by stage, the median of a variant's runs; no blocks if no run has finished."""
    timed: dict[str, dict[str, float]] = {}
    for variant in comparison.variants:
        runs = [run.stage_timings for run in variant.runs if run.stage_timings]
        for stage in dict.fromkeys(stage for timings in runs for stage in timings):
            known = [timings[stage] for timings in runs if isinstance(timings.get(stage), int | float)]
            if known:
                timed.setdefault(variant.label, {})[stage] = median(known)
    names = list(dict.fromkeys(stage for timings in timed.values() for stage in timings))
    rows = [["seconds", *names]]
    for label, timings in timed.items():
        rows.append([label, *(f"{timings[name]:.1f}" if name in timings else "-" for name in names)])
    return [Block("table", rows=rows)] if timed else []


def runs(comparison: Comparison) -> list[list[str]]:
    rows = [["variant", "run", "seed", "state", "step", "validation loss", "over the base", "commit"]]
    for variant in comparison.variants:
        for run in variant.runs:
            rows.append([variant.label, *run_row(run)])
    return rows


def run_row(run: Any) -> list[str]:
    """A run's row: name, seed, state, last evaluated step, losses with standard errors, commit."""
    loss = over = "-"
    step = str(run.last_step)
    if (curve := run.evaluation) is not None:
        loss = mean_with_error(curve.loss[-1], ".5f")
        over = mean_with_error(curve.loss[-1].astype(np.float64) - curve.base, "+.5f")
        step = str(curve.steps[-1]) if run.state != "file" else "-"
    commit = str((run.entry.get("code") or {}).get("commit") or "-")[:10]
    return [run.name, str(run.seed if run.seed is not None else "-"), run.state, step, loss, over, commit]
