"""Samples of the VAE's posterior."""

import pytest
import torch

from sushi_research import objectives


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
    """The caches hold fp16: it is converted within the kernels that compute with it."""
    mean, std = torch.randn(2, 4, 6, 5).to(dtype), torch.rand(2, 4, 6, 5).to(dtype)
    noise = torch.randn(2, 4, 6, 5)
    sample = objectives.posterior_sample(mean, std, noise, 0.13025)
    assert torch.equal(sample, (mean.float() + std.float() * noise) * 0.13025)
