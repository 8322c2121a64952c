"""Curves of a run: with holes, short and long, evaluated or not, and under any name."""

import math
import warnings

import pytest
from PIL import Image

from sushi_research.reports import training_curves


@pytest.mark.parametrize("name", ["寿司", "a$\\frac$b", "x\udcffy", "\x1b[31m"])
def test_any_name_can_be_a_title(name, tmp_path):
    """A run's name in a plot is no formula, and no letter of it ends the run."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        training_curves.write({}, tmp_path / "loss.png", name)
    assert (tmp_path / "loss.png").stat().st_size > 300


def record(step: int, **changes: float | None) -> dict[str, float | None]:
    timestep_bins = {f"loss_by_timestep/{timestep_bin}": float(timestep_bin) for timestep_bin in range(4)}
    return {"step": step, "loss": 1.0 / step, "lr": 1e-4, "grad_norm": 0.5, **timestep_bins, **changes}


def test_curves_of_a_run_with_holes(tmp_path):
    """A step may have no sample in a quarter, and no norm; a run may be one step long."""
    holes = {"loss_by_timestep/2": None, "grad_norm": None}
    for name, records in {"long": [record(1), record(2, **holes), record(3)], "short": [record(1, **holes)]}.items():
        training_curves.write(training_curves.panels(records), tmp_path / f"{name}.png", name)
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.size == (1100, 770)


def test_points_skip_what_has_no_value():
    records = [record(1), record(2, grad_norm=None), record(3, grad_norm=0.25)]
    assert training_curves.points(records, "grad_norm") == ([1, 3], [0.5, 0.25])


def test_smoothing_has_no_bias_at_its_start():
    # Of a constant it is that constant from the first value on: Adam's correction. The tolerance is rounding in float64.
    assert training_curves.smooth([3.0] * 50) == pytest.approx([3.0] * 50, rel=1e-12)
    # By hand, factor 0.5: 4; (0.5 * 2 + 0.5 * 8) / 0.75; (0.5 * 5 + 0.5 * 1) / 0.875.
    assert training_curves.smooth([4.0, 8.0, 1.0], factor=0.5) == pytest.approx([4.0, 5 / 0.75, 3 / 0.875], rel=1e-12)
    assert training_curves.smooth([]) == []


def test_a_run_that_is_only_evaluated_has_its_panels():
    first = {"step": 0, "evaluation/loss_over_base": 0.0, "evaluation/drift": 0.1, "evaluation/drift_se": 0.01}
    evaluated = [first, first | {"step": 5}]
    assert [title.split(" (")[0] for title in training_curves.panels(evaluated)] == [
        "validation loss, over the base's",
        "drift from the base",
    ]
    assert training_curves.panels([]) == training_curves.panels([first]) == {}
    assert training_curves.panels([{"step": 40, "missing_from": 1}]) == {}, "all lines are lost"


def test_long_curves_are_thinned_but_keep_their_gaps():
    values = [float(step) for step in range(10_000)]
    values[4321] = math.nan
    steps, shown = training_curves.thinned(range(1, 10_001), values)
    assert len(steps) in (training_curves.MOST_POINTS, training_curves.MOST_POINTS + 1)
    assert (steps[0], steps[-1]) == (1, 10_000) and [
        steps[n] for n, value in enumerate(shown) if math.isnan(value)
    ] == [4322]
