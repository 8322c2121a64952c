"""The inputs of a command: base model, data and caches."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from sushi_research import stopping
from sushi_research.caches import encoding
from sushi_research.caches.caches import Caches, free_memory
from sushi_research.config import TrainingConfig
from sushi_research.data.training_data import Data, captions_of, prompts_of
from sushi_research.errors import UserError
from sushi_research.fingerprints import HashCache
from sushi_research.models import loading
from sushi_research.runs.job import Job


@dataclass(frozen=True)
class Inputs:
    """The base model, the data, their caches, and the cache of file hashes."""

    config: TrainingConfig
    base: loading.Base
    data: Data
    caches: Caches
    hash_cache: HashCache

    @cached_property
    def prompts(self) -> list[str]:
        """The prompts of the sample images."""
        return prompts_of(self.config, self.data.items or self.data.held_out)

    @cached_property
    def captions(self) -> list[str]:
        """Every distinct text to encode: captions, prompts, drift captions, and the empty text."""
        return captions_of(self.config, self.data, self.prompts)


def fill_caches(job: Job, inputs: Inputs) -> tuple[int, int]:
    """Encodes missing entries, shared by all processes. Returns how many (images, captions) were missing.

    Each encoder is loaded only if it is needed and freed afterwards, so none is in memory while training. What is encoded when it
    is stopped is kept. Raises UserError if the device runs out of memory, or if new entries cannot be read back.
    """
    kept = f"what is encoded is kept in {inputs.config.cache.folder}; the same command again continues"
    with stopping.doing("caching", kept):
        return _fill(job, inputs)


def _fill(job: Job, inputs: Inputs) -> tuple[int, int]:
    base, data, caches, model = inputs.base, inputs.data, inputs.caches, job.model
    rank, world = job.rank, job.world
    missing_captions = caches.missing_captions(inputs.captions)
    missing_latents = caches.missing_latents(data)
    if missing_captions:
        text = model.load_text(base, job.device)
        encoding.encode_captions(
            caches.texts,
            missing_captions,
            lambda caption: model.encode_caption(text, caption, **caches.text_settings),
            rank=rank,
            world=world,
        )
        del text
        free_memory()
    if missing_latents:
        vae = loading.load_vae(base, caches.vae_dtype, job.device)
        try:
            encoding.encode_latents(caches.latents, missing_latents, vae, rank=rank, world=world)
        except torch.OutOfMemoryError as error:
            raise UserError(
                "out of memory while encoding the images: close other programs that use the device, lower --data.resolution, "
                "or fill the caches on a larger device (scripts/cache_dataset.py); what is already encoded is kept."
            ) from error
        del vae
        free_memory()
    job.accelerator.wait_for_everyone()
    caches.texts.refresh()
    caches.latents.refresh()
    lost = caches.missing_latents(data) or caches.missing_captions(caption for _, caption in missing_captions)
    if lost:
        raise UserError(
            f"{len(lost)} cache entries that were just written cannot be read back: check the disk of {caches.latents.folder}."
        )
    return len(missing_latents), len(missing_captions)
