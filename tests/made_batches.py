"""Small made-up batches."""

from __future__ import annotations

from dataclasses import replace

import torch

from sushi_research.fast.batch import Batch


def batch_of(step: int, size: int = 2, **changes) -> Batch:
    """`size` samples of 4 x 6 latents, with values that depend on `step`; `changes` are fields of `Batch`."""
    generator = torch.Generator().manual_seed(step)
    keys = tuple((step, f"image {number}", 0) for number in range(size))
    made = Batch(
        mean=torch.randn(size, 4, 4, 6, generator=generator),
        std=torch.rand(size, 4, 4, 6, generator=generator),
        text={"hidden": torch.randn(size, 77, 8, generator=generator).half()},
        time_ids=torch.rand(size, 6, generator=generator),
        loss_weights=torch.rand(size, generator=generator),
        names=tuple(map(str, range(size))),
        keys=keys,
        seed=3,
        device=torch.device("cpu"),
        prefetched={"noise": torch.randn(size, 4, 4, 6, generator=generator)},
        to_base=torch.rand(size, generator=generator) < 0.5,
        step=torch.tensor(step),
    )
    return replace(made, **changes)
