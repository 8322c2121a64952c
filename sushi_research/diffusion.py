"""The diffusion mathematics of training: schedule, noising, target, loss weight. Pure functions on tensors.

Notation of DDPM (Ho et al. 2020, arXiv 2006.11239): x0 the clean latents, eps the noise, abar_t the cumulative product of
alphas, x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps (their equation 4). B samples, C channels, H x W latents.
"""

from __future__ import annotations

import torch

NUM_TIMESTEPS = 1000


def alphas_cumprod(
    beta_start: float = 0.00085, beta_end: float = 0.012, num_timesteps: int = NUM_TIMESTEPS
) -> torch.Tensor:
    """abar_t, [T] float32, of Stable Diffusion's `scaled_linear` schedule: the square roots of beta are equally spaced.

    Equal bit for bit to diffusers' `DDPMScheduler(beta_schedule="scaled_linear", ...).alphas_cumprod`. SD1.5 and SDXL
    were both trained on it, whichever scheduler their repositories ship for sampling.
    """
    betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=torch.float32) ** 2
    return torch.cumprod(1.0 - betas, dim=0)


def add_noise(latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, abar: torch.Tensor) -> torch.Tensor:
    """x_t [B, C, H, W] from x0 and eps of that shape, timesteps [B] int64, abar [T] (DDPM equation 4)."""
    abar_t = abar[timesteps].view(-1, 1, 1, 1)
    return abar_t.sqrt() * latents + (1.0 - abar_t).sqrt() * noise


def offset_noise(noise: torch.Tensor, offset: torch.Tensor, strength: float) -> torch.Tensor:
    """Noise offset (Guttenberg 2023): adds `strength` x one normal value per sample and channel, offset [B, C].

    Lets a model learn pictures much darker or brighter than average. The result is the noise that is added and predicted.
    """
    return noise + strength * offset[:, :, None, None]


def posterior_sample(mean: torch.Tensor, std: torch.Tensor, noise: torch.Tensor, scaling_factor: float) -> torch.Tensor:
    """A fresh sample of the VAE posterior, scaled for the UNet; [B, C, H, W] fp32.

    Matches diffusers' `DiagonalGaussianDistribution.sample()` times the VAE's `scaling_factor`.
    """
    return (mean.float() + std.float() * noise) * scaling_factor


def snr(timesteps: torch.Tensor, abar: torch.Tensor) -> torch.Tensor:
    """Signal-to-noise ratio abar_t / (1 - abar_t), [B] float32."""
    abar_t = abar[timesteps]
    return abar_t / (1.0 - abar_t)


def min_snr_weight(timesteps: torch.Tensor, abar: torch.Tensor, gamma: float | None) -> torch.Tensor:
    """Min-SNR-gamma loss weight for an eps target, [B]: min(snr, gamma) / snr (Hang et al. 2023, arXiv 2303.09556, eq. 5).

    `gamma=None` is no weighting: ones.
    """
    if gamma is None:
        return torch.ones(timesteps.shape, dtype=torch.float32, device=timesteps.device)
    ratio = snr(timesteps, abar)
    return ratio.clamp(max=gamma) / ratio


def mse_per_sample(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error of each sample over its C x H x W values, in float32: [B]."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


def timestep_quarter(timesteps: torch.Tensor) -> torch.Tensor:
    """Which quarter of the schedule a timestep lies in, [B] int64: 0 (least noise) to 3 (most)."""
    return timesteps * 4 // NUM_TIMESTEPS
