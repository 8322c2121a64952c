"""Latents from what the VAE's encoder gives."""

from __future__ import annotations

import torch


def posterior_sample(mean: torch.Tensor, std: torch.Tensor, noise: torch.Tensor, scaling_factor: float) -> torch.Tensor:
    """A sample of the VAE posterior, scaled for the UNet; [B, C, H, W] fp32.

    Matches diffusers' `DiagonalGaussianDistribution.sample()` times the VAE's `scaling_factor`. `noise` is fp32, so the sum and
    the product are computed in fp32 whatever dtype `mean` and `std` have: that conversion is exact and needs no copy.
    """
    assert noise.dtype == torch.float32
    return (mean + std * noise) * scaling_factor
