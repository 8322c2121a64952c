"""The clocks of a comparison at equal training time: GPU or CPU time, which other load on the machine hardly changes, or the wall
clock if the runs recorded nothing else. Times by different clocks are not compared."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sushi_research.experiments.seeds import by_seed
from sushi_research.reports.curve import Curve
from sushi_research.reports.run_record import RunRecord
from sushi_research.reports.training_log import WALL


def clocks_of(curves: Sequence[Curve]) -> list[str]:
    """The distinct clocks of the curves whose training time is known, sorted."""
    return sorted({curve.times.clock for curve in curves if curve.times.clock is not None})


def time_axis(curves: Sequence[Curve]) -> tuple[str, str]:
    """(axis of the curves, its label) for plots: the clock that all curves have in common, else the wall clock."""
    clocks = clocks_of(curves)
    if len(clocks) == 1 and clocks[0] != WALL:
        return "seconds", f"seconds of training ({clocks[0]})"
    return "wall_seconds", f"seconds of training ({WALL})"


def wall_seconds_at(runs: Sequence[RunRecord], at: float) -> float:
    """The wall-clock seconds of training, by the mean over seeds, when the training time of the runs was `at`."""
    return float(
        np.mean(
            [
                np.mean([np.interp(at, run.evaluation.seconds, run.evaluation.times.wall_seconds) for run in group])
                for group in by_seed(runs).values()
            ]
        )
    )
