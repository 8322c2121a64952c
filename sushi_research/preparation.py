"""From a config to training items and filled caches: what the training scripts and `cache_dataset.py` do alike.

`model` is a model module (`sushi_research.models.sdxl`, say) throughout: its functions, not an object.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from accelerate import Accelerator

from sushi_research import dataset, encode
from sushi_research.buckets import BucketRule
from sushi_research.cache import Store
from sushi_research.config import TrainingConfig
from sushi_research.errors import UserError
from sushi_research.fingerprints import FileMemo
from sushi_research.held_out import DRIFT_CAPTIONS, held_out_items, hold_out, read_separate
from sushi_research.items import Item, make_items
from sushi_research.models import loading
from sushi_research.run_folder import RunFolder


def open_memo(config: TrainingConfig) -> FileMemo:
    """The memo of file hashes beside the caches: a file is read and hashed once, until its size or time changes."""
    return FileMemo(Path(config.cache.folder) / "files.json")


def find_base(config: TrainingConfig, model: ModuleType) -> loading.Base:
    """The base that the config names, refused unless it is of the model module's architecture."""
    base = loading.resolve_base(
        config.model.base,
        revision=config.model.revision,
        variant=config.model.variant,
        vae=config.model.vae,
        vae_revision=config.model.vae_revision,
        text_encoders=config.model.text_encoders,
        tokenizers=config.model.tokenizers,
        prediction_type=config.model.prediction_type,
        zero_terminal_snr=config.model.zero_terminal_snr,
        only=model.NAME,
    )
    loading.require_vae(base, model.SCALING_FACTOR)
    return base


@dataclass(frozen=True)
class Data:
    """What is trained on: the items of an epoch, and the scan that tells what was used, what was not, and why.

    `held_out` is what is evaluated on and never trained on; `look_alikes` says which of it resembles a training image.
    """

    items: list[Item]
    scan: dataset.Scan
    held_out: list[Item] = field(default_factory=list)
    look_alikes: list[str] = field(default_factory=list)


def read_data(config: TrainingConfig, memo: FileMemo, run: RunFolder | None, accelerator: Accelerator) -> Data:
    """Scans the data, places every image in its bucket, and accounts for every file in the run's data_report.json.

    Raises UserError, before anything else happens, when a file cannot be used and `data.on_bad_file` is "stop".
    """
    read = functools.partial(
        dataset.scan,
        image_column=config.data.image_column,
        caption_column=config.data.caption_column,
        memo=memo,
        show_progress=accelerator.is_main_process,
    )
    # The main process reads the files, the others then find them in the memo.
    with accelerator.main_process_first():
        memo.load()
        scan = read(config.data.path, split=config.data.split, revision=config.data.revision)
    rule = bucket_rule(config)
    held, look_alikes = [], []
    if config.evaluation.held_out:
        held = hold_out(scan, config.evaluation.held_out)
    elif config.evaluation.path is not None:
        with accelerator.main_process_first():
            held, look_alikes = read_separate(config, scan, read)
    items, too_small = make_items(scan.samples, rule)
    held_items, held_too_small = held_out_items(held, rule)
    too_small += held_too_small
    left_out = {problem.name for problem in too_small}
    scan.samples = [sample for sample in scan.samples if sample.name not in left_out]
    scan.problems = sorted([*scan.problems, *too_small], key=lambda problem: (problem.name, problem.reason))
    # Written here only for a refusal; the report of a run that has begun is not touched by one that may not go on.
    report = run.data_report if run and run.record() is None else None
    if accelerator.is_main_process and report is not None:
        dataset.write_report(scan, report)
    dataset.require_clean(scan, config.data.on_bad_file, report)
    return Data(items, scan, held_items, look_alikes)


def bucket_rule(config: TrainingConfig) -> BucketRule:
    """Which bucket an image goes to, as the config has it."""
    return BucketRule(
        resolution=config.data.resolution,
        step=config.data.bucket_step,
        min_side=config.data.bucket_min_side or config.data.resolution // 2,
        max_side=config.data.bucket_max_side or config.data.resolution * 2,
        upscale=config.data.upscale,
    )


def prompts_of(config: TrainingConfig, items: Sequence[Item]) -> list[str]:
    """The prompts of the sample pictures: the config's, or the first three distinct captions of the data."""
    if not config.sample.enabled:
        return []
    return list(config.sample.prompts) or list(dict.fromkeys(item.sample.caption for item in items))[:3]


def captions_of(config: TrainingConfig, data: Data, prompts: Sequence[str]) -> list[str]:
    """Every distinct text that is encoded: the data's captions, the empty one, what the sample pictures and the evaluation
    need."""
    captions = {item.sample.caption for item in [*data.items, *data.held_out]}
    return sorted({"", config.sample.negative_prompt, *prompts, *captions, *drift_captions(config, data)})


def drift_captions(config: TrainingConfig, data: Data) -> list[str]:
    """The captions on which the drift from the base is measured, in their order: none that is trained on."""
    if not data.held_out:
        return []
    asked = config.evaluation.drift_captions
    trained = {item.sample.caption for item in data.items}
    return [caption for caption in dict.fromkeys(DRIFT_CAPTIONS if asked is None else asked) if caption not in trained]


@dataclass(frozen=True)
class Caches:
    """The open stores, and what an entry is bound to."""

    latents: Store
    texts: Store
    vae_hash: str
    vae_dtype: torch.dtype
    encoder_hashes: tuple[str, ...]
    text_settings: dict[str, Any]
    flips: tuple[bool, ...] = field(default=(False,))

    def latent_key(self, item: Item, flip: bool) -> str:
        return encode.latent_key(item, flip, self.vae_hash, self.vae_dtype)

    def text_key(self, caption: str) -> str:
        return encode.text_key(caption, self.encoder_hashes, self.text_settings)

    def missing_latents(self, data: Data) -> list[tuple[str, Item, bool]]:
        """What the store lacks: the training items, mirrored where they are flipped, and the held-out ones as they are."""
        find = functools.partial(encode.missing_latents, self.latents, vae_hash=self.vae_hash, dtype=self.vae_dtype)
        missing = [*find(data.items, flips=self.flips), *find(data.held_out, flips=(False,))]
        return sorted(missing, key=lambda entry: entry[0])

    def missing_captions(self, captions: Iterable[str]) -> list[tuple[str, str]]:
        return encode.missing_captions(self.texts, captions, self.encoder_hashes, self.text_settings)

    def text(self, caption: str) -> dict[str, torch.Tensor]:
        return self.texts.get(self.text_key(caption))


def open_caches(
    config: TrainingConfig, base: loading.Base, model: ModuleType, memo: FileMemo, accelerator: Accelerator
) -> Caches:
    """Opens and verifies both stores. The main process goes first: it sets damaged shards aside, to be made again."""
    folder = Path(config.cache.folder)
    with accelerator.main_process_first():
        memo.load()
        repair = accelerator.is_main_process
        latents = Store.open(folder / "latents", encode.LATENT_TENSORS, repair=repair)
        texts = Store.open(folder / f"text_{model.NAME}", model.TEXT_TENSORS, repair=repair)
        vae_hash = base.hash("vae", memo)
        encoder_hashes = tuple(base.hash(name, memo) for name in model.TEXT_ENCODERS)
        if accelerator.is_main_process:
            memo.save()
    return Caches(
        latents=latents,
        texts=texts,
        vae_hash=vae_hash,
        vae_dtype=loading.vae_dtype(base, accelerator.device),
        encoder_hashes=encoder_hashes,
        text_settings={name: getattr(config.model, name) for name in model.TEXT_SETTINGS},
        # A probability of 1 still wants a fixed picture: the mirrored one alone.
        flips={0.0: (False,), 1.0: (True,)}.get(config.data.flip, (False, True)),
    )


def fill_caches(
    caches: Caches,
    data: Data,
    captions: Iterable[str],
    base: loading.Base,
    model: ModuleType,
    accelerator: Accelerator,
) -> tuple[int, int]:
    """Encodes what is missing, shared by all processes; returns how many (images, captions) were missing.

    Each encoder is loaded only if it has work, and freed when done: while training, none is in memory.
    """
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    missing_captions = caches.missing_captions(captions)
    missing_latents = caches.missing_latents(data)
    if missing_captions:
        text = model.load_text(base, device)
        encode.encode_captions(
            caches.texts,
            missing_captions,
            lambda caption: model.encode_caption(text, caption, **caches.text_settings),
            rank=rank,
            world=world,
        )
        del text
        free_memory()
    if missing_latents:
        vae = loading.load_vae(base, caches.vae_dtype, device)
        try:
            encode.encode_latents(caches.latents, missing_latents, vae, rank=rank, world=world)
        except torch.OutOfMemoryError as error:
            raise UserError(
                "out of memory while encoding the images: close other programs that use the device, lower --data.resolution, "
                "or fill the caches on a larger one (scripts/cache_dataset.py); what was encoded is kept."
            ) from error
        del vae
        free_memory()
    accelerator.wait_for_everyone()
    caches.texts.refresh()
    caches.latents.refresh()
    lost = caches.missing_latents(data) or caches.missing_captions(caption for _, caption in missing_captions)
    if lost:
        raise UserError(
            f"{len(lost)} cache entries that were just written cannot be read back: check the disk of {caches.latents.folder}."
        )
    return len(missing_latents), len(missing_captions)


def free_memory() -> None:
    """Gives back what a freed model held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
