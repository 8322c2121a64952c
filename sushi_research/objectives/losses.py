"""Errors of predictions, one number for each sample.

d is the difference between a prediction and its target. Near d = 0 every loss but l1 and smooth_l1 is d^2, so that a learning rate
keeps its meaning.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from sushi_research.objectives.schedule import NUM_TIMESTEPS, Schedule

# Losses that depend on c.
WITH_C = ("huber", "smooth_l1", "pseudo_huber")


@dataclass(frozen=True)
class Loss:
    """How an error d counts (`loss_per_sample`). `c` is [T] float32 on the device, for the losses of WITH_C."""

    type: str = "mse"
    c: torch.Tensor | None = None


def loss_per_sample(
    prediction: torch.Tensor,
    target: torch.Tensor,
    timesteps: torch.Tensor,
    loss: Loss,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The mean error of each sample over its C x H x W values, in float32: [B]. `mask` is that of `mse_per_sample`.

    - "mse": d^2.
    - "l1": |d|.
    - "huber" (Huber 1964): d^2 where |d| <= c, and 2 c |d| - c^2 beyond; twice torch's `huber_loss(delta=c)`.
    - "smooth_l1": the same over c; twice torch's `smooth_l1_loss(beta=c)`.
    - "pseudo_huber" (Charbonnier et al. 1997): 2 c (sqrt(d^2 + c^2) - c), which kohya and diffusers call "huber".
    """
    if loss.type == "mse":
        return mse_per_sample(prediction, target, mask)
    difference = prediction - target.float()
    if loss.type == "l1":
        return _mean(difference.abs(), mask)
    assert loss.type in WITH_C and loss.c is not None, f"no loss of the type {loss.type}"
    c = loss.c[timesteps].view(-1, 1, 1, 1)
    if loss.type == "pseudo_huber":
        square = difference.square()
        # sqrt(d^2 + c^2) - c without the difference of two numbers that are nearly equal: in fp32 little is left of that where d is
        # much smaller than c.
        return _mean(2.0 * c * (square / ((square + c.square()).sqrt() + c)), mask)
    size = difference.abs()
    within = torch.minimum(size, c)
    errors = within * (2.0 * size - within)
    return _mean(errors if loss.type == "huber" else errors / c, mask)


def mse_per_sample(prediction: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean squared error of each sample over its C x H x W values, in float32: [B].

    With a mask [B, 1, H, W] float32 of weights from 0 to 1 it is the weighted mean, sum(w e) / sum(w): a small subject counts as
    much as one that fills the image. A sample whose weights are all 0 has the error 0.
    """
    # With one operand in fp32 the difference is computed in fp32. The conversion of the other is exact and needs no copy.
    return _mean((prediction - target.float()).square(), mask)


def _mean(errors: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    if mask is None:
        return errors.flatten(1).mean(1)
    weights = mask.expand_as(errors)
    return (errors * weights).flatten(1).sum(1) / weights.flatten(1).sum(1).clamp(min=torch.finfo(torch.float32).tiny)


def c_table(name: str, c: float, schedule: Schedule) -> torch.Tensor:
    """c at each timestep, [T] float32 on the CPU: large, as of mse, where there is little noise, and the given c at the end.

    "constant": c. "exponential": c^(t / T) (scheduled pseudo-Huber loss, Khrapov et al. 2024, arXiv 2403.16728). "snr":
    (1 - c) / (1 + sigma)^2 + c with sigma = noise / signal, which is infinite where there is only noise. As
    `get_huber_threshold_if_needed` of kohya's sd-scripts, which has no "snr" for rectified flow.
    """
    if name == "constant":
        return torch.full((NUM_TIMESTEPS,), c)
    if name == "exponential":
        return (math.log(c) * torch.arange(NUM_TIMESTEPS, dtype=torch.float64) / NUM_TIMESTEPS).exp().float()
    assert name == "snr", f"no schedule of c called {name}"
    sigma = schedule.snr.double().rsqrt()
    return ((1.0 - c) / (1.0 + sigma).square() + c).float()
