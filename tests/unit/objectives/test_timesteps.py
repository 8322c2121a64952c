"""Which timesteps are drawn, and how often."""

import pytest
import torch

from sushi_research.objectives.timesteps import Timesteps, draw_timesteps, logit_normal


class Given:
    """Draws that are given."""

    def __init__(self, uniform=None):
        self.given, self.asked = uniform, []

    def integers(self, purpose, high):
        self.asked.append((purpose, high))
        return torch.tensor([0, high - 1])

    def uniform(self, purpose, shape=()):
        return self.given


def test_uniform_timesteps_are_the_integers_of_earlier_runs():
    batch = Given()
    assert draw_timesteps(batch, Timesteps()).tolist() == [0, 999]
    assert draw_timesteps(batch, Timesteps(200, 699)).tolist() == [200, 699]
    assert draw_timesteps(batch, Timesteps(999, 999)).tolist() == [999, 999]
    assert batch.asked == [("timestep", 1000), ("timestep", 500), ("timestep", 1)]


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.5, 0.7), (1.0, 2.0)])
@pytest.mark.parametrize(("first", "last"), [(0, 999), (100, 399)])
def test_logit_normal_is_the_sigmoid_of_a_normal_number(mean, std, first, last):
    """By its quantiles: with the uniform number u, floor(n sigmoid(mean + std ndtri(u))), as kohya and OneTrainer compute it."""
    count = last - first + 1
    u = torch.linspace(0, 1, 4098)[1:-1]
    found = draw_timesteps(Given(u), Timesteps(first, last, logit_normal(count, mean, std)))
    exact = first + (count * torch.sigmoid(mean + std * torch.special.ndtri(u.double()))).long()
    assert found.dtype == torch.int64 and found.min() >= first and found.max() <= last
    assert (found - exact).abs().max() <= 1 and (found != exact).float().mean() < 0.002, "rounded at the edges"


def test_the_smallest_and_the_largest_number_have_timesteps():
    ends = torch.tensor([0.0, 1 - 2**-24])
    for std in (0.01, 1.0, 100.0):
        found = draw_timesteps(Given(ends), Timesteps(cumulative=logit_normal(1000, 0.0, std)))
        assert 0 <= found[0] <= found[1] <= 999
    assert draw_timesteps(Given(ends), Timesteps(7, 7, logit_normal(1))).tolist() == [7, 7]


def test_the_probabilities_are_the_shares_that_are_drawn():
    u = torch.linspace(0, 1, 200_002)[1:-1]
    for choice in (Timesteps(cumulative=logit_normal(1000, 1.0)), Timesteps(100, 104, logit_normal(5, -0.5, 0.7))):
        shares = torch.bincount(draw_timesteps(Given(u), choice), minlength=1000).double() / len(u)
        torch.testing.assert_close(choice.probabilities(), shares, rtol=0, atol=2e-5)
    assert Timesteps(998, 999).probabilities()[996:].tolist() == [0, 0, 0.5, 0.5]
