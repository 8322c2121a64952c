"""The test of scores: the exact sign-flip test, the sign test, seeds, and an interval that agrees with the p-value."""

import itertools

import numpy as np
import pytest
from scipy import stats

from sushi_research.errors import UserError
from sushi_research.reports.score_statistics import sign_flip_difference
from sushi_research.reports.statistics import LEVEL, paired_difference


def test_one_run_each_is_the_exact_sign_flip_test():
    d = np.random.default_rng(0).normal(0.4, 1.0, 10)
    signs = np.array(list(itertools.product((-1, 1), repeat=10)))
    exact = np.mean(np.abs(signs @ d) >= abs(d.sum()) * (1 - 1e-12))
    found = sign_flip_difference(np.zeros((10, 1)), d[:, None])
    # 99,999 random sets of signs: four standard errors of a share.
    assert found.p_value == pytest.approx(exact, abs=4 * np.sqrt(exact / 99_999)) and found.value == pytest.approx(
        d.mean()
    )
    ours, theirs = found, stats.permutation_test((d,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert ours.p_value == pytest.approx(theirs.pvalue, abs=4 * np.sqrt(exact / 99_999))


def test_the_interval_holds_what_the_same_test_does_not_reject():
    d = np.random.default_rng(1).exponential(size=(3, 12, 1)) - 0.2
    found = sign_flip_difference(np.zeros((3, 12, 1)), d, same_seeds=True)
    for end, outwards in ((found.low, -1), (found.high, 1)):
        for step, is_inside in ((-0.02, True), (0.02, False)):
            p = sign_flip_difference(np.full((3, 12, 1), end + outwards * step), d, same_seeds=True).p_value
            assert (p > LEVEL) == is_inside, (end, step, p)
    assert (found.low > 0) == (found.p_value <= LEVEL)


def test_scores_that_differ_alike_are_found_where_the_bootstrap_finds_nothing():
    """31 of 32 units become right in two of three runs, 30 in the third."""
    a, b = np.zeros((3, 32, 1)), np.ones((3, 32, 1))
    b[:, 0], b[2, 1] = 0, 0
    ours, bootstrap = (test(a, b, same_seeds=True, pairs=20) for test in (sign_flip_difference, paired_difference))
    assert ours.p_value * 20 <= LEVEL < bootstrap.p_value * 20
    # Differences that are all equal: the sign test, and never certain.
    found = sign_flip_difference(np.zeros((9, 1)), np.ones((9, 1)))
    assert found.p_value == pytest.approx(2.0**-8, abs=1e-3) and (found.low, found.high) == (1, 1)


def test_runs_that_differ_widen_the_interval():
    """The same units, once with equal runs and once with runs of different strength: seeds are accounted for."""
    d = np.random.default_rng(2).normal(1.0, 0.3, (1, 16, 1)).repeat(3, axis=0)
    equal = sign_flip_difference(np.zeros_like(d), d, same_seeds=True)
    apart = sign_flip_difference(np.zeros_like(d), d + np.array([-0.8, 0, 0.8])[:, None, None], same_seeds=True)
    assert apart.value == pytest.approx(equal.value)
    assert equal.p_value < 1e-3 and apart.p_value > 0.05 and apart.high - apart.low > 4 * (equal.high - equal.low)
    assert apart.smallest_detectable > 4 * equal.smallest_detectable


def test_the_order_of_units_and_of_the_variants_does_not_matter():
    rng = np.random.default_rng(3)
    a, b = (rng.integers(0, 2, (2, 20, 1)).astype(float) for _ in "ab")
    b[:, :9] = 1
    found, order = sign_flip_difference(a, b), rng.permutation(20)
    assert sign_flip_difference(a[:, order], b[:, order]) == found
    mirrored = sign_flip_difference(b, a)
    assert (mirrored.value, mirrored.low, mirrored.high) == (-found.value, -found.high, -found.low)
    assert mirrored.p_value == found.p_value
    # Also where the mean difference is 0, of which neither variant is ahead.
    for differences in ([-1, 2, -1, 1, 0, 1, -1, -3, -1, 1, 1, 1], [1, -2, 3, 3, -3, -2, -2, -2, 1, -1, 0, 4]):
        a, b = np.zeros((1, 12, 1)), np.array(differences, dtype=float)[None, :, None]
        one, two = sign_flip_difference(a, b), sign_flip_difference(b, a)
        assert (one.value, one.low, one.high) == (0, -two.high, -two.low) and one.p_value == two.p_value
    same = sign_flip_difference(a, a)
    assert (same.value, same.low, same.high, same.p_value) == (0, 0, 0, 1)


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(UserError, match="needs 8 held-out"):
        sign_flip_difference(np.zeros((7, 1)), np.ones((7, 1)))
