"""Writes an adapter file of a run: the last adapter, or that of the best evaluated step."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from sushi_research.adapters import kohya_format, trained_images
from sushi_research.caches.inputs import Inputs
from sushi_research.caches.store import entry_key
from sushi_research.runs.job import Job
from sushi_research.training.plan import Plan
from sushi_research.training.resume import RunState


def write(
    job: Job,
    inputs: Inputs,
    plan: Plan,
    run_state: RunState,
    unet: torch.nn.Module,
    *,
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    step: int,
    chosen: Mapping[str, str] | None = None,
) -> None:
    """Writes the adapter of `step` to `path`, reads it back as diffusers does, and raises if it differs from `tensors`.

    `tensors` are fp32 master weights by name; `chosen` is further metadata. Only the main process may call this. UserError if a
    value overflows in `lora.save_dtype` or the file cannot be written; AdapterFileError if it does not load as it should.
    """
    config, architecture = job.config, job.model.NAME
    assert job.run is not None
    metadata = kohya_format.adapter_metadata(
        config,
        architecture=architecture,
        name=job.run.name,
        base=_published_name(inputs.base.source),
        base_hash=run_state.hashes["base_model"]["unet"],
        dataset_hash=run_state.hashes["data"],
        config_hash=entry_key(identity=run_state.identity),
        images=plan.images,
        steps=step,
        epochs=int(round(step * plan.global_batch_size / plan.items_per_epoch, 2)),
        prediction=inputs.base.prediction,
        trained=(job.started, time.time()),
    )
    metadata |= trained_images.metadata_of({item.sample.image_hash for item in inputs.data.items}) | dict(chosen or {})
    dtype = getattr(torch, config.lora.save_dtype)
    kohya_format.save_adapter(path, unet, architecture=architecture, state=tensors, dtype=dtype, metadata=metadata)
    kohya_format.verify_saved(path, unet, architecture=architecture, state=tensors, dtype=dtype)


def _published_name(source: str) -> str:
    """A hub id unchanged; for a local path only the last part, because adapters are published and the user's paths are not."""
    return os.path.basename(os.path.abspath(source)) if os.path.exists(source) else source
