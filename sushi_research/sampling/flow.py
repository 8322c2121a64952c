"""Samples rectified flows with diffusers' pipelines of SD1.5 and SDXL, by Euler's method on the noise level sigma."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler


class FlowEuler(FlowMatchEulerDiscreteScheduler):
    """diffusers' scheduler for flows, with what the pipelines of Stable Diffusion ask of a scheduler.

    Its noise levels are sigma = shift u / (1 + (shift - 1) u) (Esser et al. 2024, arXiv 2403.03206, equation 23) for u = 1,
    (N - 1) / N, ..., 1 / N, and 0 at the end: N equal parts, shifted once, as in the samplers of SD3 and FLUX, and as ComfyUI's
    schedule "simple" with the node ModelSamplingSD3. diffusers' own choice, where no sigmas are given, shifts the least of them
    twice. The UNet gets 1000 sigma, not rounded.
    """

    # The pipelines multiply the first noise by this: a flow begins with the noise itself.
    init_noise_sigma = 1.0

    def scale_model_input(self, sample: torch.Tensor, timestep: Any = None) -> torch.Tensor:
        """What the UNet gets, which is the sample as it is."""
        return sample

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Sets `sigmas` [N + 1] and `timesteps` [N], float32."""
        super().set_timesteps(sigmas=np.linspace(1.0, 1.0 / num_inference_steps, num_inference_steps), device=device)
