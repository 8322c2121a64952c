"""What makes a run that run: hashes of its data and base, its validation set, and the provenance entry of a start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from types import ModuleType
from typing import Any

from accelerate import Accelerator

from sushi_research.caches import encoding
from sushi_research.caches.caches import Caches
from sushi_research.caches.store import entry_key
from sushi_research.config import TrainingConfig
from sushi_research.config.command_line import config_to_dict
from sushi_research.data.samples import dataset_hash
from sushi_research.data.training_data import Data, bucket_rule
from sushi_research.evaluation import drift, validation_set
from sushi_research.evaluation.validation_set import Pack
from sushi_research.fingerprints import FileMemo
from sushi_research.models import loading
from sushi_research.runs import provenance


def make_pack(config: TrainingConfig, base: loading.Base, data: Data, caches: Caches, base_hash: str) -> Pack | None:
    """The frozen pack of the run's held-out images, None where it has none; nothing needs to be encoded for it."""
    if not data.held_out:
        return None
    # SD1.5 is told no sizes; a convention that cannot matter must not part two packs.
    convention = getattr(config.data, "time_ids", "image")
    draws = config.evaluation.draws
    return validation_set.make_pack(data.held_out, draws, caches, base.prediction, base_hash, convention)


def hashes_of(
    base: loading.Base, model: ModuleType, data: Data, memo: FileMemo, accelerator: Accelerator
) -> dict[str, Any]:
    """Hashes of what is trained on ("data") and of the base's components ("base_model")."""
    of_base = {name: base.hash(name, memo) for name in ("unet", "vae", *model.TEXT_ENCODERS)}
    if accelerator.is_main_process:
        memo.save()
    return {"data": dataset_hash(data.items), "base_model": of_base}


def provenance_of(
    config: TrainingConfig,
    base: loading.Base,
    data: Data,
    caches: Caches,
    hashes: Mapping[str, Any],
    pack: Pack | None,
    settings: Mapping[str, Any] | None,
    precision: str,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """The provenance entry of this start; `settings` is the run's identity, None where nothing is trained."""
    entry = provenance.collect(
        config=config_to_dict(config),
        config_hash=entry_key(identity=settings) if settings is not None else None,
        dataset_hash=hashes["data"],
        split=_split(config, data),
        pack=pack.hash if pack else None,
        recipe=_recipe(config, caches),
        base_hashes=hashes["base_model"],
        precision=precision,
        device=str(accelerator.device),
        world=accelerator.num_processes,
    )
    entry["base_source"] = {"base": base.source, "revision": base.revision, "vae": base.vae_source}
    entry["prediction"] = asdict(base.prediction)
    return entry


def _split(config: TrainingConfig, data: Data) -> dict[str, Any]:
    """Where the held-out images come from, how many there are, and the hash of which."""
    held_out, separate = config.evaluation.held_out, config.evaluation.path is not None
    return {
        "source": "held_out" if held_out else "path" if separate else None,
        "share": held_out or None,
        "images": len(data.held_out),
        "hash": dataset_hash(data.held_out) if data.held_out else None,
    }


def _recipe(config: TrainingConfig, caches: Caches) -> str:
    """Hash of how pictures and captions become what is trained and evaluated on; what they are does not enter."""
    return entry_key(
        encode=encoding.RECIPE,
        evaluation=validation_set.SCHEME,
        drift=drift.SCHEME,
        vae_dtype=str(caches.vae_dtype),
        text=caches.text_settings,
        buckets=asdict(bucket_rule(config)),
        time_ids=getattr(config.data, "time_ids", None),
    )
