"""The noise of a training step, beyond one normal number for each value of the latents."""

from __future__ import annotations

import torch


def offset_noise(noise: torch.Tensor, offset: torch.Tensor, strength: float) -> torch.Tensor:
    """Noise offset (Guttenberg 2023): adds `strength` x one normal value per sample and channel, offset [B, C].

    Helps a model learn images that are much darker or brighter than average. The result is both added to the latents and used
    as the noise in the target.
    """
    return noise + strength * offset[:, :, None, None]
