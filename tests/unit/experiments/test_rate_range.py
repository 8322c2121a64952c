"""A learning-rate range test: the curve, and what it says."""

import io

import numpy as np
import pytest
from PIL import Image

from sushi_research.experiments import rate_range
from sushi_research.experiments.rate_range import curve_of, describe, has_diverged, smoothed, suggestion_of

STEPS = range(1, 101)
RATES = {step: 10 ** (-6 + 5 * (step - 1) / 99) for step in STEPS}


def two_runs(change, scatter=0.02, seed=0):
    """A test in which log(loss / base) is `change(rate)` and some scatter; the base's losses differ by a lot from step to step."""
    random = np.random.default_rng(seed)
    base = {step: float(np.exp(random.normal(-3, 1))) for step in STEPS}
    losses = {step: base[step] * float(np.exp(change(RATES[step]) + scatter * random.normal())) for step in STEPS}
    return losses, base


def valley(rate):
    """Falls from 1e-4 on by 30 %, and rises above 1e-2."""
    return -0.36 / (1 + (1e-4 / rate) ** 2) + 2 * max(0.0, np.log10(rate / 1e-2)) ** 2


def test_the_curve_of_losses_that_scatter_by_a_factor_of_three_is_smooth():
    losses, base = two_runs(valley)
    curve = curve_of(RATES, losses, base)
    true = np.array([valley(rate) for rate in curve.rates])
    inner = slice(3, -3)  # at the ends a fit leans on one side only
    assert np.abs(curve.smooth - true)[inner].max() < 0.06
    assert np.abs((curve.smooth - true) / curve.errors)[:60].max() < 5
    found = suggestion_of(curve)
    assert 1.5e-5 < found.falls < 8e-5 and 4e-4 < found.lowest < 1.5e-2 and 1e-2 < found.rises < 5e-2
    assert found.range == (found.lowest / 10, found.lowest / 2)
    text = " ".join(describe(curve, found))
    assert f"lowest at {found.lowest:.2g} (3" in text and f"try optimizer.lr from {found.lowest / 10:.2g} to" in text


def test_what_the_curve_does_not_say_is_not_suggested():
    for seed in range(20):
        curve = curve_of(RATES, *two_runs(lambda rate: 0.0, scatter=0.1, seed=seed))
        assert suggestion_of(curve) == rate_range.Suggestion(), seed
    assert "does not fall below" in describe(curve, suggestion_of(curve))[0]
    curve = curve_of(RATES, *two_runs(lambda rate: -0.4 / (1 + (1e-2 / rate))))
    found = suggestion_of(curve)
    assert found.still_falling and found.range is None and found.rises is None
    assert describe(curve, found)[-1].startswith("it was still falling at the highest rate (1e-06 to 0.1)")
    assert suggestion_of(curve_of({}, {}, {})) == rate_range.Suggestion()


def test_a_straight_line_stays_and_errors_are_those_of_the_place():
    values = np.arange(50) * 0.1
    assert smoothed(values)[0] == pytest.approx(values, abs=1e-12)
    random = np.random.default_rng(1)
    scattered = np.concatenate([0.01 * random.normal(size=100), random.normal(size=100)])
    _, errors = smoothed(scattered)
    assert 0.001 < np.median(errors[:80]) < 0.01 < 0.1 < np.median(errors[120:]) < 1


def test_it_ends_when_the_loss_stays_far_above_the_base():
    base = dict.fromkeys(range(1, 10), 0.1)
    assert not has_diverged({1: 0.5, 2: 0.5}, base)
    assert not has_diverged({1: 0.5, 2: 0.1, 3: 0.5}, base)
    assert has_diverged({1: 0.1, 2: 0.3, 3: 0.3, 4: 0.3}, base)


def test_the_picture():
    curve = curve_of(RATES, *two_runs(valley))
    with Image.open(io.BytesIO(rate_range.picture(curve, suggestion_of(curve), "adamw"))) as image:
        assert image.size[0] > 600 and len(image.convert("RGB").getcolors(10**6)) > 50
