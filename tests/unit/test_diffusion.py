"""The mathematics against diffusers' own schedulers and against closed forms."""

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.training_utils import compute_snr

from sushi_research import diffusion


@pytest.fixture(scope="module")
def reference():
    return DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, num_train_timesteps=1000)


def test_schedule_equals_diffusers_bit_for_bit(reference):
    abar = diffusion.alphas_cumprod()
    assert torch.equal(abar, reference.alphas_cumprod)
    assert abar[999].item() == pytest.approx(0.0046601, abs=1e-7)  # the known end of Stable Diffusion's schedule


def test_noising_equals_diffusers_bit_for_bit(reference):
    latents, noise = torch.randn(5, 4, 8, 6), torch.randn(5, 4, 8, 6)
    timesteps = torch.tensor([0, 1, 500, 998, 999])
    ours = diffusion.add_noise(latents, noise, timesteps, diffusion.alphas_cumprod())
    assert torch.equal(ours, reference.add_noise(latents, noise, timesteps))


def test_posterior_sample_equals_diffusers():
    moments = torch.randn(2, 8, 6, 5)
    distribution = DiagonalGaussianDistribution(moments)
    generator = torch.Generator().manual_seed(3)
    expected = distribution.sample(generator=generator) * 0.13025
    noise = torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(3))
    assert torch.equal(diffusion.posterior_sample(distribution.mean, distribution.std, noise, 0.13025), expected)


def test_snr_and_min_snr_equal_diffusers_and_the_closed_form(reference):
    timesteps, abar = torch.arange(1000), diffusion.alphas_cumprod()
    expected = compute_snr(reference, timesteps)
    # diffusers squares a quotient of square roots: the same number with two more roundings.
    assert torch.allclose(diffusion.snr(timesteps, abar), expected, rtol=1e-5)
    weight = diffusion.min_snr_weight(timesteps, abar, 5.0)
    assert torch.allclose(weight, torch.minimum(expected, torch.tensor(5.0)) / expected, rtol=1e-5)
    assert weight[999] == 1.0 and weight[0] < 0.01 and (weight <= 1.0).all()


def test_no_gamma_is_no_weight():
    assert torch.equal(
        diffusion.min_snr_weight(torch.tensor([0, 999]), diffusion.alphas_cumprod(), None), torch.ones(2)
    )


def test_offset_noise_moves_whole_channels():
    noise, offset = torch.zeros(2, 4, 3, 3), torch.randn(2, 4)
    moved = diffusion.offset_noise(noise, offset, 0.1)
    assert torch.equal(moved, (0.1 * offset)[:, :, None, None].expand(2, 4, 3, 3))


def test_mse_per_sample_is_taken_in_float32():
    prediction = torch.full((2, 4, 64, 64), 0.1, dtype=torch.bfloat16)
    target = torch.zeros(2, 4, 64, 64)
    target[1] = 1.0
    loss = diffusion.mse_per_sample(prediction, target)
    value = prediction[0, 0, 0, 0].float()
    assert loss.dtype == torch.float32
    assert torch.allclose(loss, torch.stack([value**2, (value - 1) ** 2]), rtol=1e-6)  # 16,384 equal addends


def test_quarters():
    assert diffusion.timestep_quarter(torch.tensor([0, 249, 250, 500, 749, 750, 999])).tolist() == [0, 0, 1, 2, 2, 3, 3]
