"""The inputs of a command: base model, data and caches."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow
import torch

from sushi_research import models, stopping
from sushi_research.caches import encoding
from sushi_research.caches.caches import Caches, free_memory
from sushi_research.caches.keys import entry_key, packed
from sushi_research.caches.latent_entries import LatentEntries
from sushi_research.caches.mask_entries import MaskEntries, encode_masks
from sushi_research.conditioning import ALL_CHUNKS, ONE_CHUNK
from sushi_research.config import TrainingConfig
from sushi_research.config.prompts import Prompt
from sushi_research.config.text_encoders import vectors_of
from sushi_research.data.run_texts import captions_of, prompt_texts, prompts_of, with_others
from sushi_research.data.training_data import Data
from sushi_research.errors import UserError
from sushi_research.fingerprints import HashCache
from sushi_research.models import loading
from sushi_research.models.truncation import chunks_in, chunks_of, token_counts
from sushi_research.remembered import columns_hash
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
    def prompts(self) -> list[Prompt]:
        """The prompts of the sample images. UserError if the file that should have them cannot be used."""
        return prompts_of(self.config, self.data.learned or self.data.held_out)

    @cached_property
    def long_prompts(self) -> dict[str, int]:
        """The number of chunks of 75 tokens of each prompt and negative prompt of the sample images that needs more than one."""
        return chunks_of(
            self.base, models.load(self.base.architecture), prompt_texts(self.config, self.prompts), self._new_tokens
        )

    @cached_property
    def own_prompts(self) -> dict[str, int]:
        """`long_prompts`, and with several chunks of captions also those that fit: prompts are encoded as programs read them."""
        fitting = (
            prompt_texts(self.config, self.prompts) - self.long_prompts.keys()
            if self.caches.chunks != ONE_CHUNK
            else ()
        )
        return self.long_prompts | dict.fromkeys(fitting, 1)

    @cached_property
    def captions(self) -> pyarrow.Array:
        """Every distinct text that is encoded as a caption: captions, drift captions, "", and prompts but `own_prompts`."""
        fitting = prompt_texts(self.config, self.prompts) - self.own_prompts.keys()
        return with_others(captions_of(self.config, self.data), fitting)

    @property
    def _new_tokens(self) -> dict[str, int]:
        section = getattr(self.config, "text_encoders", None)
        return vectors_of(section) if section is not None else {}

    def token_counts(self, texts: pyarrow.Array) -> np.ndarray:
        """`truncation.token_counts` of many texts, remembered."""
        tokens = self._new_tokens
        make = functools.partial(token_counts, self.base, models.load(self.base.architecture), texts, tokens)
        more = {"new_tokens": tokens} if tokens else {}
        key = entry_key(texts=columns_hash(texts), tokenizers=self.caches.encoder_hashes, **more)
        return self.caches.remembered.arrays("token-counts", key, lambda: {"tokens": make()})["tokens"]

    def chunks_of_captions(self, texts: pyarrow.Array) -> np.ndarray:
        """[n]: the chunks of each text as a caption, in kohya's layout always the most."""
        most, layout = self.caches.chunks.most, self.caches.chunks.layout
        if most == 1 or layout == "kohya":
            return np.full(len(texts), most)
        return np.minimum(chunks_in(self.token_counts(texts)), most)

    @cached_property
    def _caption_chunks(self) -> np.ndarray:
        return self.chunks_of_captions(self.captions)

    @cached_property
    def latent_entries(self) -> LatentEntries:
        """Every entry of the image cache that is needed."""
        return self.caches.latent_entries(self.data)

    def missing_latents(self) -> LatentEntries:
        """`latent_entries` that are not in the cache."""
        return self.latent_entries.take(~self.caches.latents.has(self.latent_entries.keys))

    @cached_property
    def mask_entries(self) -> MaskEntries:
        """Every mask that is needed."""
        return self.caches.mask_entries(self.data)

    def missing_masks(self) -> MaskEntries:
        """`mask_entries` that are not in the cache."""
        if self.caches.masks is None:
            return self.mask_entries  # there are none
        return self.mask_entries.take(~self.caches.masks.has(self.mask_entries.keys))

    def text_keys(self) -> np.ndarray:
        """The keys of all entries of the text cache that are needed, [n] of PACKED."""
        prompts = packed(self.caches.prompt_key(prompt) for prompt in self.own_prompts)
        return np.concatenate([self.caches.text_keys(self.captions), prompts])

    @property
    def text_chunks(self) -> np.ndarray:
        """The number of chunks of each entry of the text cache that is needed: of `captions`, then of `own_prompts`."""
        return np.r_[self._caption_chunks, np.array([*self.own_prompts.values()], np.int64)]

    def missing_text_chunks(self) -> np.ndarray:
        """`text_chunks` of the entries that are not in the cache."""
        prompts = [self.caches.prompt_key(prompt) not in self.caches.texts for prompt in self.own_prompts]
        captions = ~self.caches.texts.has(self.caches.text_keys(self.captions))
        return self.text_chunks[np.r_[captions, np.array(prompts, bool)]]

    def prompt_text(self, prompt: str) -> dict[str, torch.Tensor]:
        """The cached embedding of a prompt or negative prompt of the sample images; "hidden" is [77 N, D] for N chunks."""
        if prompt in self.own_prompts:
            return self.caches.texts.get(self.caches.prompt_key(prompt))
        return self.caches.text(prompt)


def fill_caches(job: Job, inputs: Inputs) -> tuple[int, int]:
    """Encodes missing entries, shared by all processes. Returns how many (images, captions) were missing.

    Each encoder is loaded only if it is needed and freed afterwards, so none is in memory while training. What is encoded when it
    is stopped is kept. Raises UserError if the device runs out of memory, or if new entries cannot be read back.
    """
    kept = f"what is encoded is kept in {inputs.config.cache.folder}; the same command again continues"
    with stopping.doing("caching", kept):
        return _fill(job, inputs)


def _fill(job: Job, inputs: Inputs) -> tuple[int, int]:
    base, caches, model = inputs.base, inputs.caches, job.model
    rank, world = job.rank, job.world
    missing_captions = caches.missing_captions(inputs.captions)
    missing_prompts = caches.missing_prompts(inputs.own_prompts)
    missing_latents = inputs.missing_latents()
    if len(missing_captions) or len(missing_prompts):
        text = model.load_text(base, job.device)
        batch = encoding.text_batch(job.device)
        encode = functools.partial(model.encode_captions, text, batch=batch, **caches.text_settings)
        share = {"batch": batch, "rank": rank, "world": world}
        encoding.encode_texts(caches.texts, missing_captions, functools.partial(encode, chunks=caches.chunks), **share)
        encoding.encode_texts(
            caches.texts, missing_prompts, functools.partial(encode, chunks=ALL_CHUNKS), **share, what="prompt"
        )
        del text, encode
        free_memory()
    if len(missing_latents):
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
    if len(missing_masks := inputs.missing_masks()):
        encode_masks(caches.masks, missing_masks, inputs.data.sets, rank=rank, world=world)
    job.accelerator.wait_for_everyone()
    if caches.masks is not None:
        caches.masks.refresh()
    caches.texts.refresh()
    caches.latents.refresh()
    lost = (
        len(inputs.missing_latents())
        or len(inputs.missing_masks())
        or sum(int((~caches.texts.has(missing.keys)).sum()) for missing in (missing_captions, missing_prompts))
    )
    if lost:
        raise UserError(
            f"{lost} cache entries that were just written cannot be read back: check the disk of {caches.latents.folder}."
        )
    return len(missing_latents), len(missing_captions) + len(missing_prompts)
