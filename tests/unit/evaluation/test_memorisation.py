"""The AUC counts pairs, its interval is Newcombe's, and the gap is Welch's."""

import numpy as np
import pytest
import scipy.stats

from sushi_research.evaluation.memorisation import auc, auc_interval, image_means, memorised, summary


def test_the_auc_counts_pairs_and_ties_by_half():
    rng = np.random.default_rng(0)
    for trained, held_out in ((5, 7), (8, 3), (1, 1)):
        one, other = (rng.integers(0, 5, count).astype(float) for count in (trained, held_out))
        pairs = [1.0 if x < y else 0.5 if x == y else 0.0 for x in one for y in other]
        assert auc(one, other) == pytest.approx(np.mean(pairs))


def plain_interval(found: float, m: int, n: int) -> list[float]:
    """As a polynomial: (t - found)^2 m n (2 - t)(1 + t) = z^2 t (1 - t) [(2 - t)(1 + t) + k((1 - t)(1 + t) + t(2 - t))]."""
    from numpy.polynomial import Polynomial

    t, z, k = Polynomial([0, 1]), scipy.stats.norm.ppf(0.975), (m + n) / 2 - 1
    both = (2 - t) * (1 + t)
    spread = z**2 * t * (1 - t) * (both + k * ((1 - t) * (1 + t) + t * (2 - t)))
    roots = ((t - found) ** 2 * m * n * both - spread).roots()
    real = roots.real[(abs(roots.imag) < 1e-9) & (roots.real > -1e-9) & (roots.real < 1 + 1e-9)]
    return [real.min(), real.max()]


@pytest.mark.parametrize(("found", "m", "n"), [(0.75, 8, 8), (0.9, 32, 20), (1.0, 8, 8), (0.0, 5, 9), (0.5, 1, 1)])
def test_the_interval_is_that_of_newcombe(found, m, n):
    assert auc_interval(found, m, n) == pytest.approx(plain_interval(found, m, n), abs=1e-6)  # roots near 1 are double


def test_the_interval_covers_as_often_as_it_says():
    """Normal values a standard deviation apart, 16 images a side; 95 % of 400 intervals, within four standard errors."""
    rng, true = np.random.default_rng(0), scipy.stats.norm.cdf(1 / 2**0.5)
    intervals = [auc_interval(auc(rng.normal(-1, 1, 16), rng.normal(0, 1, 16)), 16, 16) for _ in range(400)]
    covered = np.mean([low <= true <= high for low, high in intervals])
    assert abs(covered - 0.95) < 4 * (0.95 * 0.05 / 400) ** 0.5


def test_the_gap_is_that_of_welch():
    rng = np.random.default_rng(1)
    trained, held_out = rng.normal(-1, 1, 9), rng.normal(0, 2, 6)
    found, welch = memorised(trained, held_out), scipy.stats.ttest_ind(held_out, trained, equal_var=False)
    assert found.gap / found.gap_se == pytest.approx(welch.statistic) and found.gap_degrees == pytest.approx(welch.df)


def test_what_cannot_be_computed_is_none():
    few = memorised(np.array([0.1]), np.array([0.3, 0.5]))
    assert few.auc == 1 and few.gap == pytest.approx(0.3) and few.gap_se is few.gap_degrees is None
    bad, good = np.array([[1.0, np.inf]]), np.ones((1, 2))
    assert np.isnan(image_means(bad, good)).all() and set(summary((bad, good), (good, good)).values()) == {None}
