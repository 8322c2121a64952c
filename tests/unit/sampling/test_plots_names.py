"""A run's name in a plot is no formula, and no letter of it ends the run."""

import warnings

import pytest

from sushi_research.sampling.plots import training_curves


@pytest.mark.parametrize("name", ["寿司", "a$\\frac$b", "x\udcffy", "\x1b[31m"])
def test_any_name_can_be_a_title(name, tmp_path):
    bins = {f"loss_by_timestep/{number}": 1.0 for number in range(4)}
    records = [{"step": step, "loss": 1.0, "lr": 1e-4, "grad_norm": 0.1, **bins} for step in (1, 2)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        training_curves(records, tmp_path / "loss.png", name)
    assert (tmp_path / "loss.png").stat().st_size > 1000
