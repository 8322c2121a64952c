"""The targets against diffusers, and what an error of each kind of prediction means for the clean latents."""

import pytest
import torch

from sushi_research import objectives
from sushi_research.objectives.targets import x0_factor

TIMESTEPS = torch.tensor([0, 1, 500, 998, 999])
SCHEDULES = {
    "epsilon": objectives.diffusion_schedule(),
    "v_prediction": objectives.diffusion_schedule(zero_terminal_snr=True),
    "rectified_flow": objectives.flow_schedule(3.0),
}


def tables(schedule, timesteps=TIMESTEPS):
    return (table[timesteps].view(-1, 1, 1, 1) for table in (schedule.signal, schedule.noise))


@pytest.fixture
def latents_and_noise():
    """(latents, noise), a sample for each of TIMESTEPS."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(5, 4, 8, 6, generator=generator) for _ in range(2))


def test_the_target_of_epsilon_is_the_noise(latents_and_noise):
    latents, noise = latents_and_noise
    assert objectives.target(latents, noise, TIMESTEPS, SCHEDULES["epsilon"], "epsilon") is noise


@pytest.mark.parametrize("zero", [False, True])
def test_the_target_of_v_equals_diffusers_bit_for_bit(latents_and_noise, zero):
    from diffusers import DDPMScheduler

    settings = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    reference = DDPMScheduler(**settings, rescale_betas_zero_snr=zero)
    ours = objectives.diffusion_schedule(zero_terminal_snr=zero)
    v = objectives.target(*latents_and_noise, TIMESTEPS, ours, "v_prediction")
    assert torch.equal(v, reference.get_velocity(*latents_and_noise, TIMESTEPS))


def test_rectified_flow_goes_from_the_latents_to_the_noise_in_a_straight_line(latents_and_noise):
    """The target of diffusers' training script of SD3, noise - latents, is the derivative of x_t by sigma."""
    latents, noise = latents_and_noise
    schedule = SCHEDULES["rectified_flow"]
    flow = objectives.target(latents, noise, TIMESTEPS, schedule, "rectified_flow")
    assert torch.equal(flow, noise - latents)
    noisy = objectives.add_noise(latents, noise, TIMESTEPS, schedule)
    _, sigma = tables(schedule)
    torch.testing.assert_close(noisy - sigma * flow, latents, rtol=0, atol=1e-6)
    torch.testing.assert_close(noisy + (1 - sigma) * flow, noise, rtol=0, atol=1e-6)


def test_v_and_the_noisy_latents_hold_latents_and_noise(latents_and_noise):
    """(x_t, v) is (x0, eps) turned by an angle; turned back: x0 = a x_t - s v and eps = s x_t + a v, a^2 + s^2 = 1."""
    for ours in (objectives.diffusion_schedule(), SCHEDULES["v_prediction"]):
        latents, noise = latents_and_noise
        noisy = objectives.add_noise(latents, noise, TIMESTEPS, ours)
        v = objectives.target(latents, noise, TIMESTEPS, ours, "v_prediction")
        a, s = tables(ours)
        torch.testing.assert_close(a * noisy - s * v, latents, rtol=0, atol=2e-6)
        torch.testing.assert_close(s * noisy + a * v, noise, rtol=0, atol=2e-6)


def test_at_zero_terminal_snr_v_is_the_picture_and_x_the_noise(latents_and_noise):
    ours = SCHEDULES["v_prediction"]
    last = torch.full((5,), 999)
    assert torch.equal(objectives.add_noise(*latents_and_noise, last, ours), latents_and_noise[1])
    assert torch.equal(objectives.target(*latents_and_noise, last, ours, "v_prediction"), -latents_and_noise[0])


@pytest.mark.parametrize("kind", SCHEDULES)
def test_the_factor_turns_an_error_of_the_prediction_into_one_of_the_clean_latents(kind):
    """x0 is solved for from x_t and a prediction that is off by 0.1, in fp64."""
    schedule, timesteps = SCHEDULES[kind], torch.arange(1000)
    a, s = (table.double() for table in tables(schedule, timesteps))
    x0, noise = torch.randn(2, 1000, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noisy = a * x0 + s * noise
    wrong = objectives.target(x0, noise, timesteps, schedule, kind) + 0.1
    solved = {
        "epsilon": lambda: (noisy - s * wrong) / a,
        "v_prediction": lambda: a * noisy - s * wrong,
        "rectified_flow": lambda: noisy - s * wrong,
    }[kind]()
    found = (solved - x0).square().flatten() / 0.01
    torch.testing.assert_close(found, x0_factor(schedule, kind), rtol=1e-4, atol=1e-9)


def test_an_unknown_prediction_type_is_refused(latents_and_noise):
    ours = objectives.diffusion_schedule()
    for unknown in ("v", "sample", ""):
        with pytest.raises(AssertionError, match="no target"):
            objectives.target(*latents_and_noise, TIMESTEPS, ours, unknown)
        with pytest.raises(AssertionError, match="no loss weight"):
            objectives.loss_weights("min_snr", ours, unknown)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_prior_target_is_the_bases_prediction_where_it_is_asked_for(dtype):
    target, of_base = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2).to(dtype)
    found = objectives.prior_target(target, of_base, torch.tensor([True, False, True]))
    assert found.dtype == torch.float32
    assert torch.equal(found, torch.stack([of_base[0].float(), target[1], of_base[2].float()]))
