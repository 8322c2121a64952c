"""Averages over the steps: their decay, and averages of any length from snapshots of two, against EDM2's equations."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sushi_research.adapters.averaging import (
    KEPT_LENGTHS,
    exponent_of,
    exponential_decay,
    length_of,
    mean_age,
    power_decay,
    reconstruct,
)


def test_lengths_and_exponents_are_those_of_the_paper():
    # Section 3.1 of arXiv 2312.02696 gives both pairs.
    assert exponent_of(0.05) == pytest.approx(16.97, abs=0.005) and exponent_of(0.10) == pytest.approx(6.94, abs=0.005)
    for length in (0.005, 0.02, 0.15, 0.25, 0.28):
        assert length_of(exponent_of(length)) == pytest.approx(length, rel=1e-9)
    # The definition: the standard deviation of the time, where time tau of 1 counts in proportion to tau^exponent.
    times = (np.arange(100_000) + 0.5) / 100_000
    share = times ** exponent_of(0.15)
    mean = np.average(times, weights=share)
    assert np.average((times - mean) ** 2, weights=share) ** 0.5 == pytest.approx(0.15, rel=1e-4)


@pytest.mark.parametrize("decay", [0.5, 0.99, 0.999999])
def test_the_exponential_average_counts_each_step_by_its_age(decay):
    weights = np.random.default_rng(0).standard_normal((200, 5))
    running = np.full(5, np.nan)  # what was before the first step is no part of it
    for steps, value in enumerate(weights, start=1):
        factor = exponential_decay(steps, decay)
        assert 0 <= factor <= decay
        running = value if steps == 1 else factor * running + (1 - factor) * value
        ages = np.arange(steps)[::-1]
        share = decay**ages / (decay**ages).sum()
        assert running == pytest.approx(share @ weights[:steps], rel=1e-9)
        assert mean_age(steps, decay) == pytest.approx(share @ ages, rel=1e-5, abs=1e-5)
    assert exponential_decay(1, decay) == 0


def test_what_docs_ema_says_of_the_factor_of_diffusers_and_onetrainer():
    """min(decay, t / (t + 9)): up to 9 decay / (1 - decay) steps the average is that of a power function, of length 0.09."""
    from diffusers.training_utils import EMAModel

    theirs, steps = EMAModel([torch.nn.Parameter(torch.zeros(1))], decay=0.999), 2_000
    share = np.zeros(steps)
    for step in range(1, steps + 1):
        factor = theirs.get_decay(step)
        assert factor == (0 if step == 1 else step / (step + 9))
        share *= factor
        share[step - 1] = 1 - factor
    times = np.arange(1, steps + 1)
    deviation = np.sqrt(np.average((times - share @ times) ** 2, weights=share)) / steps
    assert deviation == pytest.approx(length_of(8), rel=1e-2) and length_of(8) == pytest.approx(0.0905, abs=1e-4)


@pytest.mark.parametrize("length, most", [(0.03, 0.03), (0.07, 0.003), (0.15, 0.007), (0.25, 0.07)])
def test_an_average_of_any_length_from_snapshots_is_the_one_that_was_not_kept(length, most):
    """The running average of a random walk with the decay of that length, against the combination of 20 snapshots of two others."""
    steps = 400
    walk = np.cumsum(np.random.default_rng(0).standard_normal((steps, 2_000)), axis=0)
    running = {each: np.zeros(2_000) for each in (length, *KEPT_LENGTHS)}
    kept = {}
    for step in range(1, steps + 1):
        for each, average in running.items():
            decay = power_decay(step, exponent_of(each))
            average *= decay
            average += (1 - decay) * walk[step - 1]
            if step % 20 == 0 and each != length:
                kept[step, each] = average.copy()
    combination = reconstruct(list(kept), steps, length)
    found = sum(factor * average for factor, average in zip(combination.factors, kept.values(), strict=True))
    assert combination.error < most and sum(combination.factors) == pytest.approx(1)
    rms = lambda values: np.sqrt((values**2).mean())  # noqa: E731
    # The nearest of the averages that were kept is many times as far away.
    nearest = min(rms(running[each] - running[length]) for each in KEPT_LENGTHS)
    assert rms(found - running[length]) < nearest / (20 if length < 0.25 else 8)


def test_the_factors_are_those_of_the_paper_s_integrals():
    """Algorithm 3: A x = b with the integrals of products of the continuous profiles, here by quadrature."""
    steps, length = 20_000, 0.13
    snapshots = [(step, each) for step in (5_000, 10_000, 20_000) for each in KEPT_LENGTHS]
    times = np.arange(0.5, steps, 1.0)

    def profile(step: int, of_length: float) -> np.ndarray:
        exponent = exponent_of(of_length)
        return np.where(times < step, (exponent + 1) * (times / step) ** exponent / step, 0.0)

    basis = np.stack([profile(*each) for each in snapshots], axis=1)
    expected = np.linalg.solve(basis.T @ basis, basis.T @ profile(steps, length))
    found = reconstruct(snapshots, steps, length)
    assert found.factors == pytest.approx(expected / expected.sum(), abs=1e-4)
    # One that was kept is itself.
    itself = reconstruct(snapshots, steps, KEPT_LENGTHS[0])
    assert itself.factors == pytest.approx([0, 0, 0, 0, 1, 0], abs=1e-9) and itself.error < 1e-9
