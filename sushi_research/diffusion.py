"""The diffusion mathematics of training: schedule, noising, target, loss weight. Pure functions on tensors.

Notation of DDPM (Ho et al. 2020, arXiv 2006.11239): x0 the clean latents, eps the noise, abar_t the cumulative product of
alphas, x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps (their equation 4). B samples, C channels, H x W latents.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

NUM_TIMESTEPS = 1000


@dataclass(frozen=True)
class Objective:
    """The training objective, constant during a run. `abar` is [T] float32 on the device."""

    abar: torch.Tensor
    prediction_type: str
    snr_gamma: float | None
    noise_offset: float
    dropout: float


def alphas_cumprod(
    beta_start: float = 0.00085,
    beta_end: float = 0.012,
    num_timesteps: int = NUM_TIMESTEPS,
    *,
    zero_terminal_snr: bool = False,
) -> torch.Tensor:
    """abar_t, [T] float32, of Stable Diffusion's `scaled_linear` schedule: the square roots of beta are equally spaced.

    Bit for bit equal to diffusers' `DDPMScheduler(beta_schedule="scaled_linear", ...).alphas_cumprod`, with
    `rescale_betas_zero_snr` for `zero_terminal_snr`. SD1.5 and SDXL were both trained on this schedule, although their
    repositories contain other schedulers for sampling. Some later bases were trained on the zero-terminal-SNR variant, which
    ends at abar = 0 (pure noise).
    """
    betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=torch.float32) ** 2
    abar = torch.cumprod(1.0 - betas, dim=0)
    return _end_in_noise(abar) if zero_terminal_snr else abar


def _end_in_noise(abar: torch.Tensor) -> torch.Tensor:
    """Shifts and scales sqrt(abar) [T] so that abar keeps its first value and ends at exactly 0 (arXiv 2305.08891, alg. 1)."""
    root = abar.sqrt()
    first, last = root[0], root[-1]
    abar = ((root - last) * (first / (first - last))) ** 2
    # Converts to betas and back as diffusers does, because the conversion changes the last bits.
    betas = 1.0 - torch.cat([abar[:1], abar[1:] / abar[:-1]])
    return torch.cumprod(1.0 - betas, dim=0)


def add_noise(latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, abar: torch.Tensor) -> torch.Tensor:
    """x_t [B, C, H, W] from x0 and eps of that shape, timesteps [B] int64, abar [T] (DDPM equation 4)."""
    abar_t = abar[timesteps].view(-1, 1, 1, 1)
    return abar_t.sqrt() * latents + (1.0 - abar_t).sqrt() * noise


def offset_noise(noise: torch.Tensor, offset: torch.Tensor, strength: float) -> torch.Tensor:
    """Noise offset (Guttenberg 2023): adds `strength` x one normal value per sample and channel, offset [B, C].

    Helps a model learn images that are much darker or brighter than average. The result is both added to the latents and used
    as the noise in the target.
    """
    return noise + strength * offset[:, :, None, None]


def target(
    latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, abar: torch.Tensor, prediction_type: str
) -> torch.Tensor:
    """The UNet's target [B, C, H, W] from x0 and eps of the same shape, timesteps [B] int64, abar [T].

    "epsilon": eps itself. "v_prediction": v = sqrt(abar_t) eps - sqrt(1 - abar_t) x0 (Salimans & Ho 2022, arXiv 2202.00512,
    section 4), bit for bit equal to diffusers' `DDPMScheduler.get_velocity`.
    """
    if prediction_type == "epsilon":
        return noise
    assert prediction_type == "v_prediction", f"no target for the prediction type {prediction_type}"
    abar_t = abar[timesteps].view(-1, 1, 1, 1)
    return abar_t.sqrt() * noise - (1.0 - abar_t).sqrt() * latents


def posterior_sample(mean: torch.Tensor, std: torch.Tensor, noise: torch.Tensor, scaling_factor: float) -> torch.Tensor:
    """A sample of the VAE posterior, scaled for the UNet; [B, C, H, W] fp32.

    Matches diffusers' `DiagonalGaussianDistribution.sample()` times the VAE's `scaling_factor`. `noise` is fp32, so the sum and
    the product are computed in fp32 whatever dtype `mean` and `std` have: that conversion is exact and needs no copy.
    """
    assert noise.dtype == torch.float32
    return (mean + std * noise) * scaling_factor


def snr(timesteps: torch.Tensor, abar: torch.Tensor) -> torch.Tensor:
    """Signal-to-noise ratio abar_t / (1 - abar_t), [B] float32."""
    abar_t = abar[timesteps]
    return abar_t / (1.0 - abar_t)


def min_snr_weight(timesteps: torch.Tensor, abar: torch.Tensor, gamma: float, prediction_type: str) -> torch.Tensor:
    """Min-SNR-gamma loss weight, [B] float32 (Hang et al. 2023, arXiv 2303.09556).

    "epsilon": min(snr, gamma) / snr. "v_prediction": min(snr, gamma) / (snr + 1), which is 0 where the SNR is 0. The SNR is that
    of `abar`, so for a zero-terminal-SNR schedule it is the rescaled one; kohya uses the SNR before rescaling.
    """
    ratio = snr(timesteps, abar)
    if prediction_type == "epsilon":
        # 0/0 at SNR 0, but epsilon bases with zero terminal SNR are refused when they are read. Checking abar here would
        # synchronise with the GPU at every step.
        return ratio.clamp(max=gamma) / ratio
    assert prediction_type == "v_prediction", f"no loss weight for the prediction type {prediction_type}"
    return ratio.clamp(max=gamma) / (ratio + 1.0)


def prior_target(target: torch.Tensor, of_base: torch.Tensor, to_base: torch.Tensor) -> torch.Tensor:
    """The target [B, C, H, W]: `of_base`, the base's own prediction, where `to_base` [B] bool is true, and `target` elsewhere.

    Prior preservation after DreamBooth (Ruiz et al. 2023, arXiv 2208.12242, equation 2), with the base's prediction in place of
    images that it generated. All three are on the device, so choosing does not wait for it.
    """
    return torch.where(to_base[:, None, None, None], of_base.to(target.dtype), target)


def mse_per_sample(prediction: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean squared error of each sample over its C x H x W values, in float32: [B].

    With a mask [B, 1, H, W] float32 of weights from 0 to 1 it is the weighted mean, sum(w e) / sum(w): a small subject counts as
    much as one that fills the image. A sample whose weights are all 0 has the error 0.
    """
    # With one operand in fp32 the difference is computed in fp32. The conversion of the other is exact and needs no copy.
    errors = (prediction - target.float()).square()
    if mask is None:
        return errors.flatten(1).mean(1)
    weights = mask.expand_as(errors)
    return (errors * weights).flatten(1).sum(1) / weights.flatten(1).sum(1).clamp(min=torch.finfo(torch.float32).tiny)


def timestep_bin(timesteps: torch.Tensor) -> torch.Tensor:
    """The timestep bin (quarter of the schedule) of each timestep, [B] int64: 0 (least noise) to 3 (most)."""
    return timesteps // (NUM_TIMESTEPS // 4)
