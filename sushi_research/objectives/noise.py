"""The noise of a training step: one normal number for each value of the latents, and what may be added to it.

B samples, C channels, H x W latents.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sushi_research.objectives.draws import Draws


@dataclass(frozen=True)
class Noise:
    """What is added to the noise; by default nothing.

    `offset`: strength of the noise offset; with `offset_random` that is the largest, and each sample has a random share of it.
    `multires_iterations`: number of coarser resolutions, of which each has `multires_discount` times the one before it.
    `input_perturbation`: strength of the noise that is added to the latents only.
    """

    offset: float = 0.0
    offset_random: bool = False
    multires_iterations: int = 0
    multires_discount: float = 0.3
    input_perturbation: float = 0.0


def draw_noise(batch: Draws, options: Noise) -> torch.Tensor:
    """The noise [B, C, H, W] float32 that is added to the latents and is part of the target."""
    noise = batch.normal("noise")
    if options.offset:
        strength = options.offset * batch.uniform("noise_offset_strength") if options.offset_random else options.offset
        noise = offset_noise(noise, batch.normal("noise_offset", (noise.shape[1],)), strength)
    if options.multires_iterations:
        ratios = 2.0 + 2.0 * batch.uniform("multires_ratio", (options.multires_iterations,))
        coarse = [
            batch.normal(f"multires_{level}", (noise.shape[1], *_largest(noise.shape[2:], level)))
            for level in range(options.multires_iterations)
        ]
        noise = multires_noise(noise, coarse, ratios, options.multires_discount)
    return noise


def perturb_input(noise: torch.Tensor, batch: Draws, options: Noise) -> torch.Tensor:
    """The noise that is added to the latents [B, C, H, W]: with input perturbation, noise + strength x further noise.

    The target keeps `noise` (Ning et al. 2023, arXiv 2301.11706): the UNet learns to predict from inputs that are a
    little off, as its own earlier errors make them in sampling. The same as `--input_perturbation` of diffusers' training scripts
    and `ip_noise_gamma` of kohya's. Not the same as OneTrainer's perturbation noise, which is in the target too.
    """
    if not options.input_perturbation:
        return noise
    return noise + options.input_perturbation * batch.normal("input_perturbation")


def offset_noise(noise: torch.Tensor, offset: torch.Tensor, strength: float | torch.Tensor) -> torch.Tensor:
    """Noise offset (Guttenberg 2023): adds `strength`, one number or [B], x one normal value per sample and channel, offset [B, C].

    Helps a model learn images that are much darker or brighter than average. The result is both added to the latents and used
    as the noise in the target.
    """
    if isinstance(strength, torch.Tensor):
        strength = strength[:, None, None, None]
    return noise + strength * offset[:, :, None, None]


def multires_noise(
    noise: torch.Tensor, coarse: list[torch.Tensor], ratios: torch.Tensor, discount: float
) -> torch.Tensor:
    """Multi-resolution noise (Whitaker 2023, "pyramid noise"): noise + sum over levels i of discount^i x coarser noise, over its
    standard deviation; [B, C, H, W].

    A sample's noise at level i has H / r^i rows and W / r^i columns, rounded down and at least one, with r its ratio of that level,
    and is enlarged bilinearly. The first level with one row or one column is the last. `ratios` [B, levels] are in [2, 4), and
    `coarse[i]` [B, C, rows, columns] holds at least so many normal numbers; those beyond are not used.

    The formula of `pyramid_noise_like` of kohya's sd-scripts, which has one ratio and one standard deviation for a whole batch.
    Here they are the sample's own, so that a sample does not depend on those beside it.
    """
    height, width = noise.shape[2:]
    total, power = noise, torch.ones_like(ratios[:, 0])
    is_open = torch.ones_like(power, dtype=torch.bool)
    for level, drawn in enumerate(coarse):
        # r^i by multiplying: a device's own power function may differ in the last bit, and with it a size.
        power = torch.ones_like(power)
        for _ in range(level):
            power = power * ratios[:, level]
        rows, columns = ((side / power).floor().clamp(min=1.0) for side in (height, width))
        enlarged = _enlarging(rows, height, drawn.shape[2]) @ drawn @ _enlarging(columns, width, drawn.shape[3]).mT
        total = total + enlarged * (is_open * discount**level)[:, None, None, None]
        is_open = is_open & (rows > 1) & (columns > 1)
    return total / total.std((1, 2, 3), keepdim=True)


def _largest(sides: torch.Size, level: int) -> tuple[int, ...]:
    """The largest sides that noise of this level can have: those of the ratio 2."""
    return tuple(max(1, side // 2**level) for side in sides)


def _enlarging(used: torch.Tensor, size: int, drawn: int) -> torch.Tensor:
    """The matrices [B, 1, size, drawn] that enlarge the first `used` [B] of `drawn` values to `size`, linearly between centres.

    Those of `interpolate(mode="bilinear", align_corners=False)`. As matrices, because sizes that differ from sample to sample
    cannot be in a recorded step.
    """
    centres = torch.arange(size, device=used.device) + 0.5
    places = (centres * (used / size)[:, None] - 0.5).clamp(min=0.0)
    places = torch.minimum(places, used[:, None] - 1.0)
    distance = (places[:, :, None] - torch.arange(drawn, device=used.device)).abs()
    return (1.0 - distance).clamp(min=0.0)[:, None]
