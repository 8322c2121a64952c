"""What the UNet should predict. x0 are the clean latents and eps is the noise, both [B, C, H, W]."""

from __future__ import annotations

import torch

from sushi_research.objectives.schedule import Schedule


def target(
    latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, schedule: Schedule, prediction_type: str
) -> torch.Tensor:
    """The UNet's target [B, C, H, W] from x0 and eps of the same shape, timesteps [B] int64.

    "epsilon": eps itself. "v_prediction": v = sqrt(abar_t) eps - sqrt(1 - abar_t) x0 (Salimans & Ho 2022, arXiv 2202.00512,
    section 4, without a number), bit for bit equal to diffusers' `DDPMScheduler.get_velocity`. "rectified_flow": eps - x0, the
    direction from the latents to the noise (Liu et al. 2022, arXiv 2209.03003, equation 1 and algorithm 1, with time from image to
    noise), as in diffusers' training script of SD3.
    """
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "rectified_flow":
        return noise - latents
    assert prediction_type == "v_prediction", f"no target for the prediction type {prediction_type}"
    signal = schedule.signal[timesteps].view(-1, 1, 1, 1)
    strength = schedule.noise[timesteps].view(-1, 1, 1, 1)
    return signal * noise - strength * latents


def x0_factor(schedule: Schedule, prediction_type: str) -> torch.Tensor:
    """[T] float64: the squared error of x0 that belongs to a squared error of 1 of the prediction, at each timestep.

    With x_t given, an error of the prediction is one of x0. "epsilon": x0 = (x_t - noise eps) / signal, so 1 / SNR (Salimans & Ho
    2022, arXiv 2202.00512, equation 9), which is infinite where there is only noise. "v_prediction": x0 = signal x_t - noise v, so
    noise^2 = 1 / (SNR + 1) (the same, section 4, without a number). "rectified_flow": x0 = x_t - noise v, so noise^2 too, which is
    another number: 1 / (1 + sqrt(SNR))^2.
    """
    if prediction_type == "epsilon":
        return 1.0 / schedule.snr.double()
    if prediction_type == "v_prediction":
        return 1.0 / (schedule.snr.double() + 1.0)
    assert prediction_type == "rectified_flow", f"no loss weight for the prediction type {prediction_type}"
    return schedule.noise.double().square()


def prior_target(target: torch.Tensor, of_base: torch.Tensor, to_base: torch.Tensor) -> torch.Tensor:
    """The target [B, C, H, W]: `of_base`, the base's own prediction, where `to_base` [B] bool is true, and `target` elsewhere.

    Prior preservation after DreamBooth (Ruiz et al. 2023, arXiv 2208.12242, equation 2), with the base's prediction in place of
    images that it generated. All three are on the device, so choosing does not wait for it.
    """
    return torch.where(to_base[:, None, None, None], of_base.to(target.dtype), target)
