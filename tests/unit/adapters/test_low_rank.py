"""Products, sums and approximations of changes are right to rounding, also where other programs are wrong."""

from __future__ import annotations

import pytest
import torch
from cases import case

from sushi_research.adapters.entries import LowRank, delta
from sushi_research.adapters.tools import low_rank

SHAPES = {"linear": (24, 16), "1x1": (24, 16, 1, 1), "3x3": (8, 12, 3, 3)}


def make(shape, rank, *, scale=0.75, mid=False, seed=0):
    """A low-rank entry for a layer of this shape."""
    generator = torch.Generator().manual_seed(seed)
    random = lambda *sizes: torch.randn(*sizes, generator=generator)  # noqa: E731
    ones = (1,) * (len(shape) - 2)
    up = random(shape[0], rank, *ones)
    if mid:
        return LowRank("x", random(rank, shape[1], 1, 1), up, scale, random(rank, rank, *shape[2:]))
    return LowRank("x", random(rank, *shape[1:]), up, scale)


def matrix(entry, shape):
    return delta(entry, shape).double().flatten(1)


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


def test_factors_are_the_change_and_sums_are_of_changes_not_of_matrices():
    """kohya's merge adds the matrices, which is another change (74 % off for two unrelated adapters)."""
    for what, shape in SHAPES.items():
        with case(what):
            one, other = make(shape, 3, seed=1), make(shape, 2, scale=-2.0, mid=len(shape) > 2, seed=2)
            found = low_rank.summed(
                [
                    low_rank.times(low_rank.change_of(each, shape), weight)
                    for each, weight in ((one, 0.5), (other, 0.25))
                ]
            )
            expected = 0.5 * matrix(one, shape) + 0.25 * matrix(other, shape)
            assert found.up.shape[1] == 5
            assert relative(found.matrix(), expected) < 1e-6


def test_an_approximation_is_the_best_one_for_every_kind_of_layer():
    """Of the same rank as the change it is the change: kohya's resize gives 1x1 convolutions another rank, and its clamp of large
    values changes exactly low-rank differences (13 %)."""
    for what, shape in SHAPES.items():
        with case(what):
            entry = make(shape, 5)
            whole = matrix(entry, shape)
            values = torch.linalg.svdvals(whole)
            for change in (low_rank.change_of(entry, shape), whole):
                found = low_rank.spectrum(change)
                torch.testing.assert_close(found.values[:5], values[:5], rtol=1e-5, atol=1e-5)
                same = low_rank.cut("x", found, 5, shape)
                assert same.rank == 5 and relative(matrix(same, shape), whole) < 1e-6
                lower = low_rank.cut("x", found, 2, shape)
                lost = float(values[2:].norm() / values.norm())
                assert lower.down.shape == (2, *shape[1:]) and lower.up.shape[:2] == (shape[0], 2)
                assert relative(matrix(lower, shape), whole) == pytest.approx(lost, rel=1e-4)


def test_the_rank_for_a_kept_share_is_the_lowest():
    values = torch.tensor([3.0, 2.0, 1.0, 0.0], dtype=torch.float64)  # squares 9, 4, 1
    for kept, rank in ((0.5, 1), (9 / 14, 1), (0.65, 2), (13 / 14, 2), (0.95, 3), (1.0, 3)):
        with case(kept):
            assert low_rank.rank_for(values, kept) == rank
    assert low_rank.rank_for(torch.zeros(4), 0.9) == 1


def test_norms_and_distances_without_the_whole_matrix():
    for what, shape in SHAPES.items():
        with case(what):
            one, other = make(shape, 2, seed=1), make(shape, 2, seed=2)
            a, b = (low_rank.change_of(each, shape) for each in (one, other))
            assert low_rank.norm(a) == pytest.approx(float(matrix(one, shape).norm()), rel=1e-6)
            expected = float((matrix(one, shape) - matrix(other, shape)).norm())
            assert low_rank.distance(a, b) == pytest.approx(expected, rel=1e-6)
            assert low_rank.distance(a, b.matrix()) == pytest.approx(expected, rel=1e-6)
            assert low_rank.distance(a, a) < 1e-12 * low_rank.norm(a)
