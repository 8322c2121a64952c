"""Where the random numbers of an objective come from."""

from __future__ import annotations

from typing import Protocol

import torch


class Draws(Protocol):
    """What noise and timesteps ask of a batch (fast/batch.py): random numbers that depend on seed, purpose and sample alone.

    B samples. `shape` is that of one sample; for `normal` it is by default that of the latents.
    """

    def normal(self, purpose: str, shape: tuple[int, ...] | None = None) -> torch.Tensor:
        """Standard normal numbers [B, *shape] float32."""

    def uniform(self, purpose: str, shape: tuple[int, ...] = ()) -> torch.Tensor:
        """Uniform numbers in [0, 1), [B, *shape] float32."""

    def integers(self, purpose: str, high: int) -> torch.Tensor:
        """Uniform integers in [0, high), [B] int64."""
