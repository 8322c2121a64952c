"""Pictures as an outcome: what the model generates for fixed prompts and a fixed seed, compared with two references.

"learned": prompts are the first captions of the validation set. Each picture has the size of its held-out image, and its distance
is that from the held-out image. "kept": prompts are the drift captions. The distance is that from the base's own picture of the
same prompt and seed: 0 for the base. Distances are of latents (picture_distances.py). The base generates its pictures once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from sushi_research.caches.inputs import Inputs
from sushi_research.caches.keys import entry_key
from sushi_research.caches.store import Store
from sushi_research.data.items import Item
from sushi_research.errors import UserError, some
from sushi_research.evaluation import picture_distances
from sushi_research.evaluation.validation_set import ValidationSet
from sushi_research.runs.job import Job
from sushi_research.sampling import pipeline, sample_grids

# Increment it when the choice of prompts or the way of generating changes.
SCHEME = 1
# The same for all runs, so that pictures of two runs can be compared prompt by prompt.
SEED = 0

Encode = Callable[[str], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Picture:
    """A prompt, the size in pixels, and the store key of the base's own picture.

    `image` is the cache key of the held-out image that the picture is compared with; None: the base's picture.
    """

    prompt: str
    height: int
    width: int
    key: str
    image: str | None = None


@dataclass(frozen=True)
class PictureSet:
    """The pictures of one kind, in their order, and a hash of everything that determines the base's pictures and the distances."""

    kind: Literal["learned", "kept"]
    pictures: tuple[Picture, ...]
    hash: str
    noise_samples: int = 1

    @property
    def name(self) -> str:
        """That of the set in `MeasuredSets`."""
        return f"pictures_{self.kind}"

    @property
    def names(self) -> tuple[str, ...]:
        """The N prompts, which are distinct."""
        return tuple(picture.prompt for picture in self.pictures)

    def timesteps(self) -> np.ndarray:
        """[N, 1] int64, zeros: a picture has no noise level."""
        return np.zeros((len(self.pictures), 1), np.int64)


@dataclass(frozen=True)
class Generated:
    """The pictures of a set: scaled latents [4, h, w] fp32 of each on the CPU; their distances and the base's, [N, 1] float32."""

    picture_set: PictureSet
    latents: list[torch.Tensor]
    distance: np.ndarray
    base_distance: np.ndarray


def learned_set(job: Job, inputs: Inputs, val_set: ValidationSet, base_hash: str) -> PictureSet | None:
    """The first `evaluation.pictures` distinct captions of the validation set, in the order of its images' content hashes."""
    first: dict[str, Item] = {}
    for item in val_set.items:
        first.setdefault(item.sample.caption, item)
    chosen = list(first.values())[: job.config.evaluation.pictures]
    pictures = [
        _picture(job, inputs, base_hash, item.sample.caption, item.bucket, inputs.caches.latent_key(item, False))
        for item in chosen
    ]
    return _made("learned", pictures)


def kept_set(job: Job, inputs: Inputs, captions: Sequence[str], base_hash: str) -> PictureSet | None:
    """The first `evaluation.pictures` of `captions`, which are those of the drift; pictures have the size of `sample`."""
    config = job.config
    size = config.sample.height or config.data.resolution, config.sample.width or config.data.resolution
    chosen = captions[: config.evaluation.pictures]
    return _made("kept", [_picture(job, inputs, base_hash, caption, size) for caption in chosen])


def _made(kind: Literal["learned", "kept"], pictures: Sequence[Picture]) -> PictureSet | None:
    if not pictures:
        return None
    keys = [[picture.key, picture.image] for picture in pictures]
    return PictureSet(kind, tuple(pictures), entry_key(kind=kind, distance=picture_distances.SCHEME, pictures=keys))


def _picture(
    job: Job, inputs: Inputs, base_hash: str, prompt: str, size: tuple[int, int], image: str | None = None
) -> Picture:
    base, sample, text_key = inputs.base, job.config.sample, inputs.caches.text_key
    key = entry_key(
        pictures=SCHEME,
        base=base_hash,
        prediction=list(base.prediction.facts().values()),
        scheduler={name: str(value) for name, value in base.scheduler.items()},
        text=text_key(prompt),
        negative=text_key(sample.negative_prompt),
        force_zeros=base.force_zeros,
        sampling=[sample.steps, sample.guidance, *size, str(job.compute_dtype), SEED],
        **({} if job.config.model.base_storage == "compute" else {"storage": job.config.model.base_storage}),
    )
    return Picture(prompt, *size, key, image)


def generate(
    job: Job, inputs: Inputs, picture_set: PictureSet, store: Store, unet: Any | None, text: Encode | None = None
) -> Generated:
    """Generates the pictures with `unet` (None: takes the base's from the store) and measures them.

    `text` encodes a prompt in place of the cached embeddings, for an adapter that changes the text encoders.
    """
    of_base = [store.get(picture.key)["latents"] for picture in picture_set.pictures]
    latents = of_base
    if unet is not None:
        found = dict(_generated(job, inputs, unet, picture_set.pictures, text or inputs.caches.text))
        latents = [found[picture] for picture in picture_set.pictures]
    references = of_base
    if picture_set.kind == "learned":
        cached, factor = inputs.caches.latents, job.model.SCALING_FACTOR
        references = [cached.get(picture.image)["mean"].float() * factor for picture in picture_set.pictures]
    return Generated(picture_set, latents, _distances(latents, references), _distances(of_base, references))


def _distances(latents: Sequence[torch.Tensor], references: Sequence[torch.Tensor]) -> np.ndarray:
    pairs = zip(latents, references, strict=True)
    return np.array([[picture_distances.distance(*pair)] for pair in pairs], np.float32)


def _generated(
    job: Job, inputs: Inputs, unet: Any, wanted: Sequence[Picture], text: Encode
) -> Iterator[tuple[Picture, torch.Tensor]]:
    """Yields each picture with its latents, [4, h, w] fp32 on the CPU; those of one size after those of another."""
    sample = job.config.sample
    for height, width in sorted({(picture.height, picture.width) for picture in wanted}):
        of_size = [picture for picture in wanted if (picture.height, picture.width) == (height, width)]
        latents = pipeline.generate_latents(
            job.model,
            inputs.base,
            unet,
            [text(picture.prompt) for picture in of_size],
            pipeline.negative_of(sample.negative_prompt, text, inputs.base.force_zeros),
            seeds=[SEED],
            steps=sample.steps,
            guidance=sample.guidance,
            height=height,
            width=width,
        )
        for picture, generated in zip(of_size, latents, strict=True):
            yield picture, generated[0].float().cpu()


def generate_missing(job: Job, inputs: Inputs, unet: Any, sets: Sequence[PictureSet], store: Store) -> None:
    """Generates this process's share of the base's pictures that the store lacks; `unet` is the base's.

    What is generated when this is stopped is kept. UserError if a picture is not finite.
    """
    distinct = {picture.key: picture for each in sets for picture in each.pictures}
    # A share of all, not of the missing ones: another run may have added some since another process looked.
    share = sorted(distinct)[job.rank :: job.world]
    mine = [distinct[key] for key in share if key not in store]
    with store.writer() as writer:
        for picture, latents in _generated(job, inputs, unet, mine, inputs.caches.text):
            if not latents.isfinite().all():
                raise UserError(
                    f"the base generates a picture that is not finite (NaN or infinity) for the prompt {picture.prompt!r}: use "
                    "train.precision bf16 or fp32, or --evaluation.pictures 0."
                )
            writer.add(picture.key, {"latents": latents}, {"caption": picture.prompt})


def decode(job: Job, inputs: Inputs, generated: Sequence[Generated]) -> list[Image.Image]:
    """The images of the pictures of all sets, in their order."""
    latents = [latents[None] for each in generated for latents in each.latents]
    prompts = [prompt for each in generated for prompt in each.picture_set.names]
    return sample_grids.decode(job, inputs, latents, prompts)


def rows_of(sets: Sequence[PictureSet]) -> list[tuple[str, str]]:
    """(file name, prompt) of each picture of all sets, in their order."""
    return [
        (f"{number:02d}-{each.kind}-seed{SEED}.png", prompt)
        for each in sets
        for number, prompt in enumerate(each.names)
    ]


def not_finite(picture_set: PictureSet, distance: np.ndarray) -> str:
    """The prompts of distances that are not finite: "2 of 8 (a cat, ...)"; "" if there are none."""
    prompts = [picture_set.names[number] for number in np.flatnonzero(~np.isfinite(distance[:, 0]))]
    return f"{len(prompts)} of {len(distance)} ({some(prompts)})" if prompts else ""
