"""Writes the adapter files of a run: the last one, those of steps on the way, and that of the best evaluated step."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sushi_research.adapters import bundled, kohya_format, lora, metadata, trained_images, verification
from sushi_research.adapters.entries import Difference
from sushi_research.adapters.formats.writing import has_one_scale
from sushi_research.caches.inputs import Inputs
from sushi_research.caches.keys import entry_key
from sushi_research.runs.job import Job
from sushi_research.training import thumbnail
from sushi_research.training.resume import RunState
from sushi_research.training.run_plan import Plan
from sushi_research.training.state import TrainState


@dataclass(frozen=True)
class AdapterWriter:
    """What is needed to write an adapter file of a run."""

    job: Job
    inputs: Inputs
    plan: Plan
    run_state: RunState
    state: TrainState
    components: Mapping[str, torch.nn.Module]

    def write(self, path: Path, step: int, chosen: Mapping[str, str] | None = None) -> None:
        """Writes the master weights of `step` to `path`, reads the file back as diffusers does, and raises if it differs from them.

        `chosen` is further metadata. Only the main process may call this. UserError if a value overflows in `lora.save_dtype` or
        the file cannot be written; AdapterFileError if it does not load as it should.
        """
        job, config = self.job, self.job.config
        assert job.run is not None
        entries = metadata.adapter_metadata(config, self._facts(step))
        if config.lora.metadata != "none":
            items = self.inputs.data.items
            # Each image has one item of instance 0. Of more images than this the file lists none.
            images = items.samples.images[items.rows[items.instances == 0]][: trained_images.MAX_IMAGES + 1]
            hashes = [image.decode() for image in images]
            entries |= trained_images.metadata_of(hashes, job.start and job.start.trained_on)
            entries |= chosen or {}
            entries |= thumbnail.newest(job, step)
        file = self._file()
        kohya_format.save_adapter(path, self.components, **file, metadata=entries or None)
        if path == job.run.adapter:  # of the finished run; the others are in the adapter files alone
            bundled.write_files(path, file["state"], file["dtype"])
        verification.verify_saved(path, self.components, **file)

    def has_written(self, path: Path) -> bool:
        """Whether the file at `path` is whole and holds the master weights as they are."""
        return kohya_format.holds(path, self.components, **self._file())

    def _file(self) -> dict[str, Any]:
        """What a file is made of, besides its metadata."""
        dtype = getattr(torch, self.job.config.lora.save_dtype)
        return {"architecture": self.job.model.NAME, "state": self.state.master_weights.named_state(), "dtype": dtype}

    def _facts(self, step: int) -> metadata.Facts:
        """What the metadata says about the adapter of `step`, besides the config."""
        job, plan, run_state, start = self.job, self.plan, self.run_state, self.job.start
        entries = lora.trained_entries(self.components)["unet"]
        # Whole matrices have no rank.
        ranks = {(each.rank, each.scale) for each in entries.values() if not isinstance(each, Difference) and each.rank}
        return metadata.Facts(
            architecture=job.model.NAME,
            name=job.run.name,
            base=_published_name(self.inputs.base.source),
            base_hash=run_state.hashes["base_model"]["unet"],
            dataset_hash=run_state.hashes["data"],
            config_hash=entry_key(identity=run_state.identity),
            images=plan.images,
            steps=step,
            epochs=int(round(step * plan.global_batch_size / plan.items_per_epoch, 2)),
            prediction=self.inputs.base.prediction,
            trained=(job.started, time.time()),
            samples=self.inputs.data.learned.used,
            started_from=start.chain if start else (),
            is_uniform=has_one_scale(entries) and len(ranks) < 2,
            rank_and_scale=min(ranks, default=None),
        )


def _published_name(source: str) -> str:
    """A hub id unchanged; for a local path only the last part, because adapters are published and the user's paths are not."""
    return os.path.basename(os.path.abspath(source)) if os.path.exists(source) else source
