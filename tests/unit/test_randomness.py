"""Draws are pure functions of their key, do not depend on each other, and keep their values for good."""

import numpy as np

from sushi_research import randomness


def test_golden_values():
    # Fixed for SCHEME 1: when these change, old runs neither resume nor share noise; raise SCHEME.
    assert randomness.integer(0, "timestep", 3, "abc", high=1000) == GOLDEN_INTEGER
    assert randomness.normal(0, "noise", 0, "abc", shape=(3,)).tolist() == GOLDEN_NORMAL


GOLDEN_INTEGER = 580
GOLDEN_NORMAL = [0.3463573753833771, 0.24047818779945374, -0.3823409974575043]


def test_same_key_same_draw_whatever_was_drawn_before():
    first = randomness.normal(7, "noise", 2, "abc", shape=(4, 8, 8))
    np.random.standard_normal(10)
    randomness.normal(7, "noise", 3, "abc", shape=(4, 8, 8))
    assert np.array_equal(first, randomness.normal(7, "noise", 2, "abc", shape=(4, 8, 8)))


def test_each_part_of_the_key_matters():
    values = [
        randomness.uniform(*arguments)
        for arguments in [(0, "a"), (1, "a"), (0, "b"), (0, "a", 1), (0, "a", "1"), (0, "a", 1, 2), (0, "a", 12)]
    ]
    assert len(set(values)) == len(values)


def test_a_larger_batch_does_not_move_a_sample():
    # The noise of a sample is its own stream, so its shape is the only thing that may change it.
    small, large = (randomness.normal(0, "noise", 0, name, shape=(2, 2)) for name in ("x", "y"))
    assert not np.array_equal(small, large)


def test_moments():
    noise = randomness.normal(0, "noise", 0, "abc", shape=(4, 128, 128))
    assert noise.dtype == np.float32
    # 65,536 draws: the mean's standard error is 0.004, the variance's 0.0055; five of them.
    assert abs(noise.mean()) < 0.02 and abs(noise.var() - 1) < 0.028
    counts = np.bincount([randomness.integer(0, "timestep", i, high=4) for i in range(4000)], minlength=4)
    assert abs(counts - 1000).max() < 5 * (4000 * 0.25 * 0.75) ** 0.5
