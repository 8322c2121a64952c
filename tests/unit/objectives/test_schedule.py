"""The schedules and the noising against diffusers' own schedulers."""

import pytest
import torch

from sushi_research import objectives
from sushi_research.models.prediction import Prediction

TIMESTEPS = torch.tensor([0, 1, 500, 998, 999])


def flow_scheduler(shift):
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=shift)


def scheduler(zero_terminal_snr):
    from diffusers import DDPMScheduler

    return DDPMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        num_train_timesteps=1000,
        rescale_betas_zero_snr=zero_terminal_snr,
    )


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "zero-terminal"])
def schedule(request):
    """(our schedule, diffusers' scheduler of the same)."""
    return objectives.diffusion_schedule(zero_terminal_snr=request.param), scheduler(request.param)


@pytest.fixture
def latents_and_noise():
    """(latents, noise), a sample for each of TIMESTEPS."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(5, 4, 8, 6, generator=generator) for _ in range(2))


def test_schedule_equals_diffusers_bit_for_bit(schedule):
    ours, reference = schedule
    abar = reference.alphas_cumprod
    assert ours.signal.dtype == ours.noise.dtype == ours.snr.dtype == torch.float32 and ours.times.dtype == torch.int64
    assert torch.equal(ours.signal, abar.sqrt()) and torch.equal(ours.noise, (1 - abar).sqrt())
    assert torch.equal(ours.times, torch.arange(1000))


def test_where_the_schedules_start_and_end():
    plain, zero = objectives.alphas_cumprod(), objectives.alphas_cumprod(zero_terminal_snr=True)
    assert plain[999].item() == pytest.approx(0.0046601, abs=1e-7)  # the known end of Stable Diffusion's schedule
    assert zero[999].item() == 0.0
    # As noisy at the beginning as before, and noisier from there on.
    assert zero[0].item() == pytest.approx(plain[0].item(), rel=1e-6)
    assert (zero[1:] < plain[1:]).all() and (zero[1:] < zero[:-1]).all()


def test_noising_equals_diffusers_bit_for_bit(schedule, latents_and_noise):
    ours, reference = schedule
    assert torch.equal(
        objectives.add_noise(*latents_and_noise, TIMESTEPS, ours), reference.add_noise(*latents_and_noise, TIMESTEPS)
    )


ALL = torch.arange(1000)


def compute_snr(reference):
    """diffusers' signal-to-noise ratio at each timestep."""
    from diffusers.training_utils import compute_snr

    return compute_snr(reference, ALL)


def test_snr_equals_diffusers(schedule):
    ours, reference = schedule
    # diffusers squares a quotient of square roots: the same number with two more roundings.
    assert torch.allclose(ours.snr, compute_snr(reference), rtol=1e-5, atol=0)


def test_timestep_bins():
    assert objectives.timestep_bin(torch.tensor([0, 249, 250, 500, 749, 750, 999])).tolist() == [0, 0, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("shift", [1.0, 2.5, 3.0])
def test_the_schedule_of_rectified_flow_is_that_of_diffusers_from_its_end(shift):
    ours, reference = objectives.flow_schedule(shift), flow_scheduler(shift)
    # diffusers computes in fp32, with one more rounding.
    torch.testing.assert_close(ours.noise, reference.sigmas.flip(0), rtol=3e-7, atol=0)
    torch.testing.assert_close(ours.times, reference.timesteps.flip(0), rtol=3e-7, atol=0)
    torch.testing.assert_close(ours.signal, 1 - ours.noise, rtol=0, atol=6e-8)
    assert (ours.signal[-1], ours.noise[-1], ours.snr[-1], ours.times[-1]) == (0, 1, 0, 1000)
    assert (ours.snr.diff() < 0).all() and ours.snr.isfinite().all()


def test_the_noising_of_rectified_flow_is_that_of_diffusers(latents_and_noise):
    ours, reference = objectives.flow_schedule(3.0), flow_scheduler(3.0)
    latents, noise = latents_and_noise
    expected = reference.scale_noise(latents, reference.timesteps.flip(0)[TIMESTEPS], noise)
    torch.testing.assert_close(objectives.add_noise(latents, noise, TIMESTEPS, ours), expected, rtol=1e-6, atol=1e-6)


def test_a_base_has_the_schedule_of_its_prediction():
    assert torch.equal(objectives.make_schedule(Prediction()).snr, objectives.diffusion_schedule().snr)
    zero = objectives.make_schedule(Prediction("v_prediction", zero_terminal_snr=True))
    assert zero.snr[-1] == 0 and zero.times.dtype == torch.int64
