"""A micro-batch, as the loader makes it and the training step reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from sushi_research import randomness


@dataclass(frozen=True)
class Batch:
    """A micro-batch: B samples of one bucket, from the caches, with random numbers that depend only on seed and sample.

    `mean`, `std` of the VAE posterior, each [B, 4, h, w]; `text` embeddings, or token ids, by name, [B, ...]; `time_ids` [B, 6]
    fp32; `names` of the files; `keys` (epoch, image hash, instance) for randomness; `prefetched` noise by purpose. `loss_weights`
    [B] fp32 are those of the sets; `mask` [B, 1, h, w] fp32, or None, weighs the loss within each image; `to_base` [B] bool says
    for each sample whether its target is the base's own prediction, or is None if no sample's is. `roles` [B] int64 is 1 for
    regularisation images; None if the run has none. `step` int64 [] is the number of the step, from 0.

    A training step that is recorded reads tensors only (docs/fast_step.md), so whatever changes from batch to batch is one.
    """

    mean: torch.Tensor
    std: torch.Tensor
    text: dict[str, torch.Tensor]
    time_ids: torch.Tensor
    loss_weights: torch.Tensor
    names: tuple[str, ...]
    keys: tuple[tuple[int, str, int], ...]
    seed: int
    device: torch.device
    prefetched: dict[str, torch.Tensor] = field(repr=False)
    mask: torch.Tensor | None = None
    to_base: torch.Tensor | None = None
    roles: torch.Tensor | None = None
    step: torch.Tensor = field(default_factory=lambda: torch.tensor(0))

    def __len__(self) -> int:
        return len(self.keys)

    def normal(self, purpose: str, shape: tuple[int, ...] | None = None) -> torch.Tensor:
        """Standard normal noise [B, *shape] fp32 (default: the latents' shape), one stream per sample (rule 4, CONTRIBUTING.md)."""
        if shape is None and purpose in self.prefetched:
            return self.prefetched[purpose]
        return to_device(self.device, normal(self.seed, purpose, self.keys, shape or tuple(self.mean.shape[1:])))

    def seed_torch(self, purpose: str, step: int) -> None:
        """Seeds torch's global generator, which libraries use: dropout inside an adapter layer."""
        torch.manual_seed(randomness.torch_seed(self.seed, purpose, step, *self.keys[0]))

    def uniform(self, purpose: str, shape: tuple[int, ...] = ()) -> torch.Tensor:
        """Uniform numbers in [0, 1), [B, *shape] fp32, one stream per sample."""
        found = [randomness.uniforms(self.seed, purpose, *key, shape=shape) for key in self.keys]
        return to_device(self.device, torch.from_numpy(np.stack(found)))

    def integers(self, purpose: str, high: int) -> torch.Tensor:
        """Uniform integers [B] int64 in [0, high), one stream per sample."""
        values = [randomness.integer(self.seed, purpose, *key, high=high) for key in self.keys]
        return to_device(self.device, torch.tensor(values))


def to_device(device: torch.device, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the device. With pinned memory the copy does not wait for the kernels queued on the GPU."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def normal(seed: int, purpose: str, keys: Sequence[tuple[int, str, int]], shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal noise [len(keys), *shape] fp32 on the CPU, one stream per key."""
    return torch.from_numpy(np.stack([randomness.normal(seed, purpose, *key, shape=shape) for key in keys]))
