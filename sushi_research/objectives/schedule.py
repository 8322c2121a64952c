"""The schedule of a base: how much of the latents and of the noise there is at each timestep, and adding that noise.

x0 are the clean latents, eps is the noise, and x_t = signal[t] x0 + noise[t] eps is what the UNet sees at timestep t of T = 1000.
B samples, C channels, H x W latents.

Diffusion (Ho et al. 2020, arXiv 2006.11239, equation 4): signal = sqrt(abar), noise = sqrt(1 - abar), with abar the cumulative
product of alphas. Rectified flow (Liu et al. 2022, arXiv 2209.03003; Esser et al. 2024, arXiv 2403.03206, equation 13):
signal = 1 - sigma, noise = sigma.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Protocol

import torch

NUM_TIMESTEPS = 1000


class PredictionLike(Protocol):
    """What `make_schedule` reads of models/prediction.py's `Prediction`, which is in a level above this one."""

    @property
    def type(self) -> str: ...
    @property
    def zero_terminal_snr(self) -> bool: ...


@dataclass(frozen=True)
class Schedule:
    """Tables over the T timesteps, least noise first, each [T] float32 but `times`.

    `signal` and `noise` are the factors of x0 and eps. `snr` = (signal / noise)^2 is the signal-to-noise ratio, 0 where there is
    only noise. `times` is what the UNet is given as its timestep: the index itself, int64, for diffusion, and 1000 sigma, float32,
    for rectified flow.
    """

    signal: torch.Tensor
    noise: torch.Tensor
    snr: torch.Tensor
    times: torch.Tensor

    def to(self, device: torch.device) -> Schedule:
        """The schedule with its tables on the device."""
        return Schedule(*(getattr(self, field.name).to(device) for field in fields(self)))


def make_schedule(prediction: PredictionLike) -> Schedule:
    """The schedule of a base with this prediction, on the CPU."""
    if prediction.type == "rectified_flow":
        return flow_schedule(getattr(prediction, "shift", 1.0))
    return diffusion_schedule(zero_terminal_snr=prediction.zero_terminal_snr)


def diffusion_schedule(*, zero_terminal_snr: bool = False) -> Schedule:
    """Stable Diffusion's schedule (`alphas_cumprod`)."""
    abar = alphas_cumprod(zero_terminal_snr=zero_terminal_snr)
    return Schedule(abar.sqrt(), (1.0 - abar).sqrt(), abar / (1.0 - abar), torch.arange(len(abar)))


def alphas_cumprod(
    beta_start: float = 0.00085,
    beta_end: float = 0.012,
    num_timesteps: int = NUM_TIMESTEPS,
    *,
    zero_terminal_snr: bool = False,
) -> torch.Tensor:
    """abar_t, [T] float32, of Stable Diffusion's `scaled_linear` schedule: the square roots of beta are equally spaced.

    It is written out, without a number, in section 3 of arXiv 2403.03206 ("LDM-Linear").

    Bit for bit equal to diffusers' `DDPMScheduler(beta_schedule="scaled_linear", ...).alphas_cumprod`, with
    `rescale_betas_zero_snr` for `zero_terminal_snr`. SD1.5 and SDXL were both trained on this schedule, although their
    repositories contain other schedulers for sampling. Some later bases were trained on the zero-terminal-SNR variant, which
    ends at abar = 0 (pure noise).
    """
    betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=torch.float32) ** 2
    abar = torch.cumprod(1.0 - betas, dim=0)
    return _end_in_noise(abar) if zero_terminal_snr else abar


def _end_in_noise(abar: torch.Tensor) -> torch.Tensor:
    """Shifts and scales sqrt(abar) [T] so that abar keeps its first value and ends at exactly 0 (arXiv 2305.08891, algorithm 1)."""
    root = abar.sqrt()
    first, last = root[0], root[-1]
    abar = ((root - last) * (first / (first - last))) ** 2
    # Converts to betas and back as diffusers does, because the conversion changes the last bits.
    betas = 1.0 - torch.cat([abar[:1], abar[1:] / abar[:-1]])
    return torch.cumprod(1.0 - betas, dim=0)


def flow_schedule(shift: float = 1.0) -> Schedule:
    """The schedule of rectified flow: sigma = shift u / (1 + (shift - 1) u) with u = 1/T, 2/T ... 1.

    Equal to the sigmas and timesteps of diffusers' `FlowMatchEulerDiscreteScheduler(shift=shift)` in reverse order. The shift
    (arXiv 2403.03206, equation 23) moves timesteps towards more noise, as larger images need. The last timestep is pure noise.
    """
    u = torch.arange(1, NUM_TIMESTEPS + 1, dtype=torch.float64) / NUM_TIMESTEPS
    sigma = shift * u / (1.0 + (shift - 1.0) * u)
    exact = (1.0 - sigma, sigma, ((1.0 - sigma) / sigma).square(), NUM_TIMESTEPS * sigma)
    return Schedule(*(table.float() for table in exact))


def add_noise(latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, schedule: Schedule) -> torch.Tensor:
    """x_t [B, C, H, W] from x0 and eps of that shape, timesteps [B] int64 (this module's docstring)."""
    signal = schedule.signal[timesteps].view(-1, 1, 1, 1)
    strength = schedule.noise[timesteps].view(-1, 1, 1, 1)
    return signal * latents + strength * noise


def timestep_bin(timesteps: torch.Tensor) -> torch.Tensor:
    """The timestep bin (quarter of the schedule) of each timestep, [B] int64: 0 (least noise) to 3 (most)."""
    return timesteps // (NUM_TIMESTEPS // 4)
