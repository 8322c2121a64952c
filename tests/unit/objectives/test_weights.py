"""The loss weights against the formulas of their papers for each prediction type, and against diffusers' SNR."""

import pytest
import torch

from sushi_research import objectives
from sushi_research.config.inputs import SHIFTS
from sushi_research.objectives import loss_weights

EPSILON = objectives.diffusion_schedule()
ZERO = objectives.diffusion_schedule(zero_terminal_snr=True)
FLOW = objectives.flow_schedule(2.5)
CASES = {
    "epsilon": ("epsilon", EPSILON),
    "v": ("v_prediction", EPSILON),
    "v, zero terminal SNR": ("v_prediction", ZERO),
    "flow": ("rectified_flow", FLOW),
    "flow, smallest shift": ("rectified_flow", objectives.flow_schedule(SHIFTS[0])),
    "flow, largest shift": ("rectified_flow", objectives.flow_schedule(SHIFTS[1])),
}
NAMES = ("min_snr", "soft_min_snr", "debiased", "p2", "v_like")
ALL = torch.arange(1000)


def close(found, expected, **tolerances):
    torch.testing.assert_close(found, expected.float(), **{"rtol": 1e-5, "atol": 1e-9} | tolerances)


def test_the_papers_weights_of_epsilon():
    """What each paper gives as the factor of the squared error of the noise."""
    snr = EPSILON.snr.double()
    close(loss_weights("min_snr", EPSILON, "epsilon", gamma=3.0), snr.clamp(max=3) / snr)
    close(loss_weights("soft_min_snr", EPSILON, "epsilon", gamma=3.0), 3 / (snr + 3))
    close(loss_weights("debiased", EPSILON, "epsilon"), snr**-0.5)
    close(loss_weights("p2", EPSILON, "epsilon", p2_k=2.0, p2_gamma=0.5), (2 + snr) ** -0.5)
    close(loss_weights("v_like", EPSILON, "epsilon"), (snr + 1) / snr)


def test_without_weight_is_v_like_for_v_and_min_snr_with_a_large_gamma_for_epsilon():
    close(loss_weights("v_like", ZERO, "v_prediction"), torch.ones(1000))
    close(loss_weights("min_snr", EPSILON, "epsilon", gamma=10_000.0), torch.ones(1000))


@pytest.mark.parametrize("name", NAMES)
def test_a_weighting_weighs_the_clean_latents_alike_for_every_prediction_type(name):
    """Weight over x0_factor is a function of the SNR alone: compared at the SNRs of the diffusion schedule."""
    options = {"gamma": 4.0, "p2_k": 2.0, "p2_gamma": 0.7}
    of_x0 = loss_weights(name, EPSILON, "epsilon", **options).double() * EPSILON.snr
    of_v = loss_weights(name, EPSILON, "v_prediction", **options).double() * (EPSILON.snr + 1)
    torch.testing.assert_close(of_v, of_x0, rtol=1e-5, atol=0)
    # A rectified flow of the same SNRs: sigma = 1 / (1 + sqrt(snr)).
    sigma = 1 / (1 + EPSILON.snr.sqrt())
    flow = objectives.Schedule(1 - sigma, sigma, EPSILON.snr, 1000 * sigma)
    of_flow = loss_weights(name, flow, "rectified_flow", **options).double() / sigma.square()
    torch.testing.assert_close(of_flow, of_x0, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("kind", "schedule"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("name", NAMES)
def test_every_weight_is_finite_and_no_step_is_infinitely_large(name, kind, schedule):
    weights = loss_weights(name, schedule, kind)
    assert weights.dtype == torch.float32 and weights.shape == (1000,)
    assert weights.isfinite().all() and (weights >= 0).all() and weights.max() < 300


def test_min_snr_is_that_of_diffusers_and_kohyas_before_the_rescaling_is_another():
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr

    settings = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    for zero, ours in ((False, EPSILON), (True, ZERO)):
        snr = compute_snr(DDPMScheduler(**settings, rescale_betas_zero_snr=zero), ALL)
        close(loss_weights("min_snr", ours, "v_prediction"), snr.clamp(max=5) / (snr + 1))
        if not zero:
            close(loss_weights("min_snr", ours, "epsilon"), snr.clamp(max=5) / snr)
    # sd-scripts computes all_snr before it rescales the betas: docs/objectives.md has these numbers.
    kohya, rescaled = (loss_weights("min_snr", each, "v_prediction") for each in (EPSILON, ZERO))
    assert rescaled[999] == 0 and kohya[999].item() == pytest.approx(0.00466, abs=1e-5)
    assert (kohya - rescaled).abs().max().item() == pytest.approx(0.0541, abs=1e-4)
