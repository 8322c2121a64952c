"""What an adapter learned and what it cost, in numbers: validation loss, concept score, and what was kept of the base's world.

python -m demo.measure RUN    # scores the adapter of a finished run into RUN/scores.json (demo/scoring.py)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from demo.checker import Checker, Reading, Score, score
from demo.concepts import Concept, known_scenes
from demo.drawing import SQUARE, Jitter, Scene, all_scenes, draw
from demo.painter import load_pipeline, paint
from sushi_research.progress import progress

CONCEPT_PROMPTS = KNOWN_PROMPTS = 32
LOSS_PICTURES, TIMESTEPS = 16, 16


@dataclass(frozen=True)
class Loss:
    """Mean squared error of the predicted noise, for each picture over all timesteps."""

    pictures: tuple[float, ...]

    @property
    def mean(self) -> float:
        return float(np.mean(self.pictures))

    def fall_from(self, before: Loss) -> tuple[float, float]:
        """By how much it is lower than `before`, and the standard error of that: pictures are paired, their noise is shared."""
        falls = np.subtract(before.pictures, self.pictures)
        return float(falls.mean()), float(falls.std(ddof=1) / len(falls) ** 0.5)


@dataclass(frozen=True)
class Measured:
    """One column of the demo's table: the base, or the adapter on it."""

    loss: Loss
    concept: Score
    known: Score
    asked: list[Scene]
    images: list[Image.Image]
    readings: list[Reading]


def checker_of(concept: Concept) -> Checker:
    """Reads a picture as one of the base's scenes or of the concept's."""
    return Checker(list(dict.fromkeys([*all_scenes(), *concept.scenes])))


def measure(base: Path, adapter: Path | None, concept: Concept, checker: Checker, *, seed: int = 1000) -> Measured:
    """Draws and scores unseen prompts of the concept and prompts of the base's world, and takes the loss on unseen pictures."""
    pipeline = load_pipeline(base, adapter)
    name = "base" if adapter is None else "adapter"
    asked, known = concept.unseen_scenes(CONCEPT_PROMPTS), known_scenes(KNOWN_PROMPTS)
    images = paint(pipeline, [scene.caption for scene in asked], seed=seed, description=f"{name}: the concept")
    old = paint(pipeline, [scene.caption for scene in known], seed=seed, description=f"{name}: the rest")
    readings = [
        checker.read(picture) for picture in progress(images + old, description="reading", unit="picture", leave=False)
    ]
    return Measured(
        loss=loss_on(pipeline, unseen_pictures(concept)),
        concept=score(readings[: len(asked)], asked),
        known=score(readings[len(asked) :], known),
        asked=asked,
        images=images,
        readings=readings[: len(asked)],
    )


def unseen_pictures(concept: Concept, count: int = LOSS_PICTURES) -> list[tuple[Scene, Image.Image]]:
    """Real pictures of the concept that no training saw, drawn here and nowhere stored."""
    generator = np.random.default_rng([7, *concept.name.encode()])
    return [(scene, draw(scene, SQUARE, jitter=Jitter.random(generator))) for scene in concept.unseen_scenes(count)]


@torch.no_grad()
def loss_on(pipeline: Any, pictures: Sequence[tuple[Scene, Image.Image]]) -> Loss:
    """The loss at `TIMESTEPS` equally spaced timesteps, each picture with its own fixed noise: the same for every adapter.

    Plain diffusers, so that it is no opinion of the trainer's own code.
    """
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    timesteps = ((torch.arange(TIMESTEPS) + 0.5) * 1000 / TIMESTEPS).long()
    errors = []
    bar = progress(pictures, description="loss on unseen pictures", unit="picture", leave=False)
    for number, (scene, picture) in enumerate(bar):
        encoded = pipeline.vae.encode(pipeline.image_processor.preprocess(picture)).latent_dist.mode()
        latents = (encoded * pipeline.vae.config.scaling_factor).expand(TIMESTEPS, -1, -1, -1)
        noise = torch.from_numpy(np.random.default_rng([8, number]).standard_normal(latents.shape, dtype=np.float32))
        context, _, *pooled = pipeline.encode_prompt(
            prompt=scene.caption, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        arguments = {}
        if pooled:  # SDXL
            size = (picture.height, picture.width)
            time_ids = torch.tensor([[*size, 0, 0, *size]], dtype=torch.float32)
            arguments["added_cond_kwargs"] = {
                "text_embeds": pooled[0].expand(TIMESTEPS, -1),
                "time_ids": time_ids.expand(TIMESTEPS, -1),
            }
        noisy = scheduler.add_noise(latents, noise, timesteps)
        predicted = pipeline.unet(noisy, timesteps, context.expand(TIMESTEPS, -1, -1), **arguments).sample
        errors.append((predicted - noise).square().mean().item())
    return Loss(tuple(errors))


if __name__ == "__main__":
    import sys

    from demo import scoring

    scoring.main(sys.argv[1:], (CONCEPT_PROMPTS, KNOWN_PROMPTS), checker_of)
