"""Draws with a base, and an adapter file on it, by diffusers' own pipelines: what a user's program would draw."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from demo.drawing import SQUARE
from sushi_research import models
from sushi_research.adapters.loading import load_adapters
from sushi_research.progress import progress

BASES = Path(__file__).parent / "base"
STEPS, GUIDANCE = 20, 2.5
BATCH = 16


def load_pipeline(folder: Path, adapter: Path | None = None) -> Any:
    """The pipeline of a diffusers folder in fp32 with the Euler scheduler, and the adapter's file on it.

    The dtype is given: the files are fp16, which a CPU is slow in and transformers would keep. UserError for an adapter file
    that is not sound or does not fit.
    """
    from diffusers import DiffusionPipeline, EulerDiscreteScheduler

    pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, **_without(folder))
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    if adapter is not None:
        load_adapters(pipeline, [adapter])[0].activate()
    return pipeline


def _without(folder: Path) -> dict[str, None]:
    from sushi_research.models.loading import resolve_base

    return models.load(resolve_base(str(folder)).architecture).PIPELINE_WITHOUT


def paint(
    pipeline: Any,
    prompts: Sequence[str],
    *,
    canvas: tuple[int, int] = SQUARE,
    seed: int = 1000,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    description: str = "drawing",
    **arguments: Any,
) -> list[Image.Image]:
    """A picture for each prompt; the n-th starts from the noise of seed + n, whatever the batch.

    `arguments` go to the pipeline: SDXL's `original_size` and `crops_coords_top_left`, say.
    """
    images: list[Image.Image] = []
    with progress(total=len(prompts), description=description, unit="picture", leave=False) as bar:
        for start in range(0, len(prompts), BATCH):
            batch = list(prompts[start : start + BATCH])
            generators = [torch.Generator().manual_seed(seed + start + place) for place in range(len(batch))]
            made = pipeline(
                batch,
                width=canvas[0],
                height=canvas[1],
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=generators,
                **arguments,
            )
            images.extend(made.images)
            bar.update(len(batch))
    return images
