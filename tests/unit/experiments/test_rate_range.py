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
    """A test in which loss / base - 1 is `change(rate)` and some scatter; the base's losses differ by a lot from step to step."""
    random = np.random.default_rng(seed)
    base = {step: float(np.exp(random.normal(-3, 1))) for step in STEPS}
    # The smaller a loss, the larger its relative scatter.
    spread = {step: scatter * (0.08 / base[step]) ** 0.5 for step in STEPS}
    losses = {step: base[step] * max(0.0, 1 + change(RATES[step]) + spread[step] * random.normal()) for step in STEPS}
    return losses, base


def valley(rate):
    """Falls from 1e-4 on by 30 %, and rises above 1e-2."""
    return -0.3 / (1 + (1e-4 / rate) ** 2) + 2 * max(0.0, np.log10(rate / 1e-2)) ** 2


def test_the_curve_of_losses_that_scatter_by_a_factor_of_three_is_smooth():
    losses, base = two_runs(valley)
    curve = curve_of(RATES, losses, base)
    true = np.minimum([valley(rate) for rate in curve.rates], 1)
    inner = slice(3, -8)  # at the ends a fit leans on one side only, and where the loss explodes it is not straight
    assert np.abs(curve.smooth - true)[inner].max() < 0.12
    assert np.abs((curve.smooth - true) / curve.errors)[:50].max() < 5
    found = suggestion_of(curve)
    assert 1e-5 < found.falls < 8e-5 and 4e-4 < found.lowest < 1.5e-2 and 1e-2 < found.rises < 5e-2
    assert found.range == (found.lowest / 10, found.lowest / 2)
    text = " ".join(describe(curve, found))
    assert f"lowest at {found.lowest:.2g}: 3" in text and f"try optimizer.lr from {found.lowest / 10:.2g} to" in text


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


def test_where_the_loss_ended_the_test_no_higher_rates_are_asked_for():
    """A loss may be lowest at the last rate before one at which it is not finite."""
    losses, base = two_runs(lambda rate: -0.4 / (1 + (1e-3 / rate)))
    curve = curve_of(RATES, {step: losses[step] for step in range(1, 81)}, base, has_ended=True)
    found = suggestion_of(curve)
    assert not found.still_falling and found.range == (found.lowest / 10, found.lowest / 2)
    assert f"above {curve.rates[-1]:.2g} it is far above the base's, or not finite" in describe(curve, found)
    for change, others in ((lambda rate: 0.0, "higher"), (lambda rate: max(0.0, np.log10(rate / 1e-2)), "lower")):
        curve = curve_of(RATES, *two_runs(change))
        assert describe(curve, suggestion_of(curve))[0].endswith(f": test {others} rates, or more steps")


def test_the_fit_is_of_the_sums_and_its_errors_are_those_of_the_place():
    values, ones = np.arange(50) * 0.1, np.ones(50)
    assert smoothed(values, ones)[0] == pytest.approx(values, abs=1e-12)
    # A step whose loss is a hundredth of the others' hardly counts.
    outlier, weights = np.zeros(50), ones.copy()
    outlier[25], weights[25] = 1.0, 0.01
    assert smoothed(outlier, ones)[0][25] > 0.08 and smoothed(outlier, weights)[0][25] < 0.002
    random = np.random.default_rng(1)
    scattered = np.concatenate([0.01 * random.normal(size=100), random.normal(size=100)])
    _, errors = smoothed(scattered, np.ones(200))
    # The sum of fourteen neighbours has little more than a quarter of the scatter of one.
    assert np.median(errors[:80]) == pytest.approx(0.0027, rel=0.3)
    assert np.median(errors[120:]) == pytest.approx(0.27, rel=0.3)


def test_it_ends_when_the_loss_stays_far_above_the_base():
    base = dict.fromkeys(range(1, 10), 0.1)
    assert not has_diverged({1: 0.5, 2: 0.5}, base)
    assert not has_diverged({1: 0.5, 2: 0.1, 3: 0.5}, base)
    assert has_diverged({1: 0.1, 2: 0.3, 3: 0.3, 4: 0.3}, base)


def test_the_picture():
    curve = curve_of(RATES, *two_runs(valley))
    with Image.open(io.BytesIO(rate_range.picture(curve, suggestion_of(curve), "adamw"))) as image:
        assert image.size[0] > 600 and len(image.convert("RGB").getcolors(10**6)) > 50
