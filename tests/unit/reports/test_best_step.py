"""The rule that chooses a step, on arrays whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sushi_research.reports.best_step import StepOutcomes, best_step, chosen_step, memorises_from

STEPS = (0, 10, 20, 30, 40)


def values(means, units: int = 16, noise: float = 0.0) -> np.ndarray:
    """[T, units] with these means exactly; the deviations of each step are its own, so differences have an error."""
    rng = np.random.default_rng(1)
    spread = rng.normal(0, noise, (len(means), units)) if noise else np.zeros((len(means), units))
    return np.array(means, dtype=float)[:, None] + spread - spread.mean(1, keepdims=True)


def outcomes(learned, kept=None, **others) -> StepOutcomes:
    return StepOutcomes(STEPS[: len(learned)], learned, kept, **others)


def test_a_falling_curve_ends_with_its_best_step():
    found = best_step(outcomes(values([0, -1, -2, -3, -4])))
    assert found.step == 40 and found.against_last is None and found.unclear == ()
    assert found.against_first.value == -3 and found.against_runner_up.other == 30


def test_equal_steps_go_to_the_earlier():
    assert chosen_step(outcomes(values([0, -1, -2, -2, -2]))) == 20


def test_a_lower_step_replaces_only_by_more_than_one_standard_error():
    """The error of a difference of two independent means is sqrt(2 / 16) x 0.4 = 0.14."""
    noisy = outcomes(values([0, -1, -1.05, -1.1, -1.08], noise=0.4))
    found = best_step(noisy)
    assert found.step == 10 and found.unclear == (20, 30, 40)
    assert found.against_last.low < 0 < found.against_last.high
    assert chosen_step(outcomes(values([0, -1, -1.05, -2, -2.05], noise=0.4))) == 30


def test_the_choice_so_far_does_not_depend_on_later_steps():
    curve = outcomes(values([0, -1, -3, -2, -4]))
    assert [chosen_step(curve, until) for until in (0, 10, 20, 30, 40)] == [None, 10, 20, 20, 40]


def test_what_is_lost_counts_and_what_is_gained_does_not():
    learned = values([0, -1, -1.5, -2, -2.5])
    assert chosen_step(outcomes(learned, values([0, 0, 0.39, 1, 2], 8))) == 20
    assert chosen_step(outcomes(learned, values([0, -9, -1, 0, -1], 8))) == 40


def test_standard_errors_add_in_squares():
    learned, kept = values([0, -1, -2], noise=0.4), values([0, 1, 1], 8, noise=0.3)
    found = best_step(outcomes(learned, kept)).against_first
    expected = math.sqrt(np.var(learned[2] - learned[1], ddof=1) / 16 + np.var(kept[2] - kept[1], ddof=1) / 8)
    assert found.standard_error == pytest.approx(expected, rel=1e-12)


def test_a_step_without_finite_values_is_skipped():
    learned = values([0, -1, -5, -2, -3])
    learned[2, 3] = np.nan
    found = best_step(outcomes(learned))
    assert (found.step, found.steps, found.skipped) == (40, (10, 30, 40), (20,))
    assert best_step(outcomes(np.full((5, 3), np.nan))) is None


def test_one_image_gives_no_standard_error():
    found = best_step(outcomes(values([0, -1, -2, -1.5, -1], 1)))
    assert found.step == 20 and math.isnan(found.against_last.standard_error) and math.isnan(found.against_last.low)


def test_only_memorising_begins_where_learning_ends_and_the_gap_grows():
    learned = values([0, -1, -2, -2, -1.9])
    held_out, trained = values([0, -0.5, -1, -1, -0.9]), values([0, -0.5, -1, -2, -3])
    assert memorises_from(outcomes(learned, held_out=held_out, trained=trained)) == 20
    assert memorises_from(outcomes(learned, held_out=held_out, trained=held_out)) is None
    still = values([0, -1, -2, -3, -4])
    assert memorises_from(outcomes(still, held_out=held_out, trained=trained)) is None
    assert memorises_from(outcomes(learned)) is None
