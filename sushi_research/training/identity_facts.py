"""The facts that identify a run (hashes of its data and base), its validation set, and its provenance entry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from sushi_research.caches.caches import Caches
from sushi_research.caches.inputs import Inputs
from sushi_research.caches.keys import RECIPE, entry_key
from sushi_research.config import TrainingConfig
from sushi_research.config.command_line import config_to_dict
from sushi_research.config.sets import sets_of
from sushi_research.data.buckets import Fitting
from sushi_research.data.dataset_hash import dataset_hash
from sushi_research.data.fitting import bucket_rule, fitting_of
from sushi_research.data.items import Item
from sushi_research.data.run_texts import drift_captions
from sushi_research.data.training_data import Data
from sushi_research.evaluation import drift, pictures, validation_set
from sushi_research.evaluation.drift import DriftSet
from sushi_research.evaluation.measured_sets import MeasuredSets
from sushi_research.evaluation.validation_set import ValidationSet
from sushi_research.runs import provenance
from sushi_research.runs.job import Job


def measured_sets_of(job: Job, inputs: Inputs, base_hash: str) -> MeasuredSets:
    """The sets that the run is measured on, by its config and data. Does not need encoded data."""
    data, drift_set = inputs.data, drift_set_of(job, inputs, base_hash)
    val_set, neutral = _image_set(job, inputs, base_hash, data.held_out), drift_captions(job.config, data)
    return MeasuredSets(
        validation=val_set,
        drift=drift_set,
        base_images=drift_set,
        prior=_image_set(job, inputs, base_hash, data.prior),
        trained=_image_set(job, inputs, base_hash, data.trained),
        pictures_learned=pictures.learned_set(job, inputs, val_set, base_hash) if val_set else None,
        pictures_kept=pictures.kept_set(job, inputs, neutral, base_hash),
    )


def validation_set_of(job: Job, inputs: Inputs, base_hash: str) -> ValidationSet | None:
    """The validation set of the run's held-out images, or None without any. Does not need encoded data."""
    return _image_set(job, inputs, base_hash, inputs.data.held_out)


def _image_set(job: Job, inputs: Inputs, base_hash: str, items: Sequence[Item]) -> ValidationSet | None:
    """The items as a set that losses are measured on; None without any."""
    config = job.config
    if not items:
        return None
    # SD1.5 has no size conditioning. Use a fixed value, because this setting must not change its validation set.
    convention = getattr(config.data, "time_ids", "image")
    noise_samples = config.evaluation.noise_samples
    return validation_set.make_validation_set(
        items, noise_samples, inputs.caches, inputs.base.prediction, base_hash, convention
    )


def drift_set_of(job: Job, inputs: Inputs, base_hash: str) -> DriftSet | None:
    """The drift set of the run, or None without drift captions. Does not need encoded data."""
    captions = drift_captions(job.config, inputs.data)
    if not captions:
        return None
    return drift.make_drift_set(
        captions,
        inputs.caches.text_key,
        job.model,
        inputs.base,
        base_hash,
        side=job.config.data.resolution,
        dtype=job.compute_dtype,
        storage=job.config.model.base_storage,
    )


def hashes_of(job: Job, inputs: Inputs) -> dict[str, Any]:
    """Hashes of the training data ("data") and of the base model's components ("base_model")."""
    base_hashes = {
        name: inputs.base.hash(name, inputs.hash_cache) for name in ("unet", "vae", *job.model.TEXT_ENCODERS)
    }
    if job.is_main:
        inputs.hash_cache.save()
    return {"data": dataset_hash(inputs.data.items, inputs.data.remembered), "base_model": base_hashes}


def provenance_of(
    job: Job,
    inputs: Inputs,
    hashes: Mapping[str, Any],
    val_set: ValidationSet | None,
    settings: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The provenance entry of this launch. `settings` is the run's identity, or None if nothing is trained."""
    config, base = job.config, inputs.base
    entry = provenance.collect(
        config=config_to_dict(config),
        config_hash=entry_key(identity=settings) if settings is not None else None,
        dataset_hash=hashes["data"],
        split=_split(config, inputs.data),
        validation_set=val_set.hash if val_set else None,
        recipe=_recipe(config, inputs.caches),
        base_hashes=hashes["base_model"],
        precision=job.precision,
        device=str(job.device),
        world=job.world,
        code=job.code,
    )
    entry["base_source"] = {"base": base.source, "revision": base.revision, "vae": base.vae_source}
    entry["prediction"] = base.prediction.facts()
    return entry


def _split(config: TrainingConfig, data: Data) -> dict[str, Any]:
    """Source, number and hash of the held-out images."""
    held_out, separate = config.evaluation.held_out, config.evaluation.path is not None
    return {
        "source": "held_out" if held_out else "path" if separate else None,
        "share": held_out or None,
        "images": len(data.held_out),
        "hash": dataset_hash(data.held_out) if data.held_out else None,
    }


def _recipe(config: TrainingConfig, caches: Caches) -> str:
    """Hash of how images and captions are processed for training and evaluation. Their content is not part of it."""
    fittings, plain = [fitting_of(config, each) for each in sets_of(config)], Fitting((bucket_rule(config),))
    return entry_key(
        encode=RECIPE,
        evaluation=validation_set.SCHEME,
        drift=drift.SCHEME,
        vae_dtype=str(caches.vae_dtype),
        text=caches.caption_settings,
        buckets=asdict(bucket_rule(config)),
        time_ids=getattr(config.data, "time_ids", None),
        **({} if fittings == [plain] else {"fittings": [asdict(each) for each in fittings]}),
    )
