"""A run's caches: the stores of VAE posteriors (latents) and text embeddings."""

from __future__ import annotations

import functools
import gc
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import torch

from sushi_research.caches.encoding import LATENT_TENSORS
from sushi_research.caches.keys import RECIPE, entry_key, packed
from sushi_research.caches.latent_entries import LatentEntries, latent_entries, latent_key
from sushi_research.caches.mask_entries import MASK_TENSORS, MaskEntries, mask_entries
from sushi_research.caches.store import Store
from sushi_research.caches.text_keys import TextEntries, prompt_key, text_key, text_keys
from sushi_research.conditioning import ONE_CHUNK, Chunks
from sushi_research.config import TrainingConfig
from sushi_research.config.sets import sets_of
from sushi_research.data.items import Item
from sushi_research.data.training_data import Data
from sushi_research.fingerprints import HashCache
from sushi_research.models import loading
from sushi_research.remembered import NOTHING_REMEMBERED, Remembered, columns_hash
from sushi_research.runs.job import Job


def open_hash_cache(config: TrainingConfig) -> HashCache:
    """The cache of file hashes, next to the other caches. A file is hashed again only if it was changed or replaced."""
    return HashCache(Path(config.cache.folder) / "files.json")


def open_remembered(config: TrainingConfig) -> Remembered:
    """What was computed from the data before, next to the other caches."""
    return Remembered(Path(config.cache.folder) / "remembered")


@dataclass(frozen=True)
class Caches:
    """The open stores, and the hashes and settings that are part of every entry's key.

    `chunks` says how much is read of a caption. `masks` is None if there are none.
    """

    latents: Store
    texts: Store
    vae_hash: str
    vae_dtype: torch.dtype
    encoder_hashes: tuple[str, ...]
    text_settings: dict[str, Any]
    remembered: Remembered = NOTHING_REMEMBERED
    chunks: Chunks = ONE_CHUNK
    masks: Store | None = None

    def latent_key(self, item: Item, flip: bool) -> str:
        return latent_key(item, flip, self.vae_hash, self.vae_dtype)

    def text_key(self, caption: str) -> str:
        return text_key(caption, self.encoder_hashes, self.caption_settings)

    @property
    def caption_settings(self) -> dict[str, Any]:
        """The settings that are part of a caption's key."""
        return self.text_settings | self.chunks.settings

    def text_keys(self, captions: pyarrow.Array) -> np.ndarray:
        """`text_key` of each caption (large_string), as a column [n] of PACKED. They are remembered."""
        key = entry_key(
            texts=columns_hash(captions), encoders=self.encoder_hashes, settings=self.caption_settings, recipe=RECIPE
        )
        make = functools.partial(text_keys, captions, self.encoder_hashes, self.caption_settings)
        return self.remembered.arrays("text-keys", key, lambda: {"keys": make()})["keys"]

    def prompt_key(self, prompt: str) -> str:
        """The key of a prompt that is not encoded as a caption is (`Inputs.own_prompts`)."""
        return prompt_key(prompt, self.encoder_hashes, self.text_settings)

    def latent_entries(self, data: Data) -> LatentEntries:
        """The entries that the data needs (`Data.encodings`)."""
        return latent_entries(list(data.encodings()), self.vae_hash, self.vae_dtype, self.remembered)

    def mask_entries(self, data: Data) -> MaskEntries:
        """The masks that the training items need. Losses that are compared, of measured items, are without masks."""
        return mask_entries(data.items.every_crop(), self.remembered)

    def missing_captions(self, captions: pyarrow.Array) -> TextEntries:
        """The entries of captions (large_string) that the cache lacks."""
        return self._missing(TextEntries.of(self.text_keys(captions), captions))

    def missing_prompts(self, prompts: Iterable[str]) -> TextEntries:
        """The entries that the cache lacks of prompts that are not encoded as captions are."""
        texts = [*prompts]
        keys = packed(self.prompt_key(prompt) for prompt in texts)
        return self._missing(TextEntries.of(keys, pyarrow.array(texts, pyarrow.large_string())))

    def _missing(self, entries: TextEntries) -> TextEntries:
        return entries.take(~self.texts.has(entries.keys))

    def text(self, caption: str) -> dict[str, torch.Tensor]:
        return self.texts.get(self.text_key(caption))


def open_caches(job: Job, base: loading.Base, hash_cache: HashCache) -> Caches:
    """Opens the stores. The main process goes first: it sets damaged shards aside, to be encoded again."""
    config, model = job.config, job.model
    folder, remembered = Path(config.cache.folder), open_remembered(config)
    with job.accelerator.main_process_first():
        hash_cache.load()
        repair = job.is_main
        latents = Store.open(folder / "latents", LATENT_TENSORS, repair=repair, remembered=remembered)
        texts = Store.open(folder / f"text_{model.NAME}", model.TEXT_TENSORS, repair=repair, remembered=remembered)
        masks = None
        if (folder / "masks").is_dir() or any(each.masks.source != "none" for each in sets_of(config)):
            masks = Store.open(folder / "masks", MASK_TENSORS, repair=repair, remembered=remembered)
        vae_hash = base.hash("vae", hash_cache)
        encoder_hashes = tuple(base.hash(name, hash_cache) for name in model.TEXT_ENCODERS)
        if job.is_main:
            hash_cache.save()
    return Caches(
        latents=latents,
        masks=masks,
        texts=texts,
        vae_hash=vae_hash,
        vae_dtype=loading.vae_dtype(base, job.device),
        encoder_hashes=encoder_hashes,
        text_settings={name: getattr(config.model, name) for name in model.TEXT_SETTINGS},
        remembered=remembered,
        chunks=Chunks(config.captions.chunks, config.captions.chunk_layout),
    )


def free_memory() -> None:
    """Releases the memory of deleted models, on the GPU too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
