"""The mathematics against diffusers' own schedulers and against closed forms."""

import pytest
import torch

from sushi_research import objectives

TIMESTEPS = torch.tensor([0, 1, 500, 998, 999])


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


def test_the_target_of_epsilon_is_the_noise(schedule, latents_and_noise):
    latents, noise = latents_and_noise
    assert objectives.target(latents, noise, TIMESTEPS, schedule[0], "epsilon") is noise


def test_the_target_of_v_equals_diffusers_bit_for_bit(schedule, latents_and_noise):
    ours, reference = schedule
    v = objectives.target(*latents_and_noise, TIMESTEPS, ours, "v_prediction")
    assert torch.equal(v, reference.get_velocity(*latents_and_noise, TIMESTEPS))


def test_v_and_the_noisy_latents_hold_latents_and_noise(schedule, latents_and_noise):
    """(x_t, v) is (x0, eps) turned by an angle; turned back: x0 = a x_t - s v and eps = s x_t + a v, a^2 + s^2 = 1."""
    ours, _ = schedule
    latents, noise = latents_and_noise
    noisy = objectives.add_noise(latents, noise, TIMESTEPS, ours)
    v = objectives.target(latents, noise, TIMESTEPS, ours, "v_prediction")
    a, s = (part[TIMESTEPS].view(-1, 1, 1, 1) for part in (ours.signal, ours.noise))
    torch.testing.assert_close(a * noisy - s * v, latents, rtol=0, atol=2e-6)
    torch.testing.assert_close(s * noisy + a * v, noise, rtol=0, atol=2e-6)


def test_at_zero_terminal_snr_v_is_the_picture_and_x_the_noise(latents_and_noise):
    ours = objectives.diffusion_schedule(zero_terminal_snr=True)
    last = torch.full((5,), 999)
    assert torch.equal(objectives.add_noise(*latents_and_noise, last, ours), latents_and_noise[1])
    assert torch.equal(objectives.target(*latents_and_noise, last, ours, "v_prediction"), -latents_and_noise[0])


def test_an_unknown_prediction_type_is_refused(latents_and_noise):
    ours = objectives.diffusion_schedule()
    for unknown in ("v", "sample", ""):
        with pytest.raises(AssertionError, match="no target"):
            objectives.target(*latents_and_noise, TIMESTEPS, ours, unknown)
        with pytest.raises(AssertionError, match="no loss weight"):
            objectives.min_snr_weights(ours, 5.0, unknown)


def test_posterior_sample_equals_diffusers():
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    moments = torch.randn(2, 8, 6, 5)
    distribution = DiagonalGaussianDistribution(moments)
    generator = torch.Generator().manual_seed(3)
    expected = distribution.sample(generator=generator) * 0.13025
    noise = torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(3))
    assert torch.equal(objectives.posterior_sample(distribution.mean, distribution.std, noise, 0.13025), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_no_copy_in_fp32_is_needed_for_the_arithmetic_of_fp32(dtype):
    """The caches hold fp16, the UNet predicts in bf16 or fp16: both are converted within the kernels that compute with them."""
    mean, std = torch.randn(2, 4, 6, 5).to(dtype), torch.rand(2, 4, 6, 5).to(dtype)
    noise, target = torch.randn(2, 4, 6, 5), torch.randn(2, 4, 6, 5)
    sample = objectives.posterior_sample(mean, std, noise, 0.13025)
    assert torch.equal(sample, (mean.float() + std.float() * noise) * 0.13025)
    predictions = [mean.clone().requires_grad_(), mean.clone().requires_grad_()]
    losses = [
        objectives.mse_per_sample(predictions[0], target),
        (predictions[1].float() - target).square().flatten(1).mean(1),
    ]
    assert torch.equal(*losses) and losses[0].dtype == torch.float32
    gradients = [torch.autograd.grad(loss.sum(), each)[0] for loss, each in zip(losses, predictions, strict=True)]
    assert torch.equal(*gradients) and gradients[0].dtype == dtype


ALL = torch.arange(1000)


def compute_snr(reference):
    """diffusers' signal-to-noise ratio at each timestep."""
    from diffusers.training_utils import compute_snr

    return compute_snr(reference, ALL)


def test_snr_equals_diffusers(schedule):
    ours, reference = schedule
    # diffusers squares a quotient of square roots: the same number with two more roundings.
    assert torch.allclose(ours.snr, compute_snr(reference), rtol=1e-5, atol=0)


def test_min_snr_of_epsilon_is_the_closed_form():
    expected = compute_snr(scheduler(False))
    weight = objectives.min_snr_weights(objectives.diffusion_schedule(), 5.0, "epsilon")
    assert torch.allclose(weight, expected.clamp(max=5.0) / expected, rtol=1e-5, atol=0)
    assert weight[999] == 1.0 and weight[0] < 0.01 and (weight <= 1.0).all()


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_of_v_is_the_closed_form_and_finite(schedule, gamma):
    ours, reference = schedule
    expected = compute_snr(reference)
    weight = objectives.min_snr_weights(ours, gamma, "v_prediction")
    assert torch.isfinite(weight).all()
    # As diffusers' training scripts have it: min(snr, gamma) / (snr + 1).
    assert torch.allclose(weight, expected.clamp(max=gamma) / (expected + 1), rtol=1e-5, atol=0)
    assert (weight[999] == 0) == (ours.signal[999] == 0)


def test_a_v_loss_is_worth_the_noise_loss_that_it_is_made_of():
    """An error in v is one in eps over sqrt(abar), so the squared error's weight differs by abar = snr / (snr + 1)."""
    ours = objectives.diffusion_schedule()
    epsilon, v = (objectives.min_snr_weights(ours, 5.0, kind) for kind in ("epsilon", "v_prediction"))
    assert torch.allclose(v, epsilon * ours.signal**2, rtol=1e-5, atol=0)


def test_offset_noise_moves_whole_channels():
    noise, offset = torch.zeros(2, 4, 3, 3), torch.randn(2, 4)
    moved = objectives.offset_noise(noise, offset, 0.1)
    assert torch.equal(moved, (0.1 * offset)[:, :, None, None].expand(2, 4, 3, 3))


def test_mse_per_sample_is_taken_in_float32():
    prediction = torch.full((2, 4, 64, 64), 0.1, dtype=torch.bfloat16)
    target = torch.zeros(2, 4, 64, 64)
    target[1] = 1.0
    loss = objectives.mse_per_sample(prediction, target)
    value = prediction[0, 0, 0, 0].float()
    assert loss.dtype == torch.float32
    assert torch.allclose(loss, torch.stack([value**2, (value - 1) ** 2]), rtol=1e-6)  # 16,384 equal addends


def test_timestep_bins():
    assert objectives.timestep_bin(torch.tensor([0, 249, 250, 500, 749, 750, 999])).tolist() == [0, 0, 1, 2, 2, 3, 3]
