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
from sushi_research.adapters.snapshots import AVERAGE
from sushi_research.caches.inputs import Inputs
from sushi_research.caches.keys import entry_key
from sushi_research.files import make_folder
from sushi_research.runs.job import Job
from sushi_research.training import thumbnail
from sushi_research.training.averages import snapshot_dtype
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

    def write(
        self, path: Path, step: int, chosen: Mapping[str, str] | None = None, *, average: str | None = None
    ) -> None:
        """Writes the master weights of `step` to `path`, reads the file back as diffusers does, and raises if it differs from them.

        `chosen` is further metadata. With the name of an `average` it is written instead of the weights as they are. Only the main
        process may call this. UserError if a value overflows in `lora.save_dtype` or the file cannot be written; AdapterFileError
        if it does not load as it should.
        """
        job = self.job
        assert job.run is not None
        entries = self._entries(step)
        if job.config.lora.metadata != "none":
            entries |= self._metadata_of(average) | dict(chosen or {})
            if self._is_sampled(average):
                entries |= thumbnail.newest(job, step)
        file = self._file(average)
        kohya_format.save_adapter(path, self.components, **file, metadata=entries or None)
        if path == job.run.adapter:  # of the finished run; the others are in the adapter files alone
            bundled.write_files(path, file["state"], file["dtype"])
        verification.verify_saved(path, self.components, **file)

    def has_written(self, path: Path, average: str | None = None) -> bool:
        """Whether the file at `path` is whole and holds the master weights as they are, or this average of them."""
        return kohya_format.holds(path, self.components, **self._file(average))

    def write_snapshot(self, path: Path, step: int, average: str) -> None:
        """Writes a snapshot of an average, with the hash of its tensors even without other metadata. UserError as `write`."""
        file = self._file(average) | {"dtype": snapshot_dtype(self.job.config)}
        if kohya_format.holds(path, self.components, **file):
            return
        make_folder(path.parent)
        entries = self._entries(step) | self._metadata_of(average)
        kohya_format.save_adapter(path, self.components, **file, metadata=entries)

    def _entries(self, step: int) -> dict[str, str]:
        """The metadata of each file of the run at `step`; {} if it is to have none."""
        config, job = self.job.config, self.job
        entries = metadata.adapter_metadata(config, self._facts(step))
        if config.lora.metadata != "none":
            items = self.inputs.data.items
            # Each image has one item of instance 0. Of more images than this the file lists none.
            images = items.samples.images[items.rows[items.instances == 0]][: trained_images.MAX_IMAGES + 1]
            hashes = [image.decode() for image in images]
            entries |= trained_images.metadata_of(hashes, job.start and job.start.trained_on)
        return entries

    def _metadata_of(self, average: str | None) -> dict[str, str]:
        """The entry that says which average is written: this one, or the one that is in the place of the weights."""
        averages = self.state.averages
        average = average or (averages and averages.in_use)
        return {AVERAGE: averages.describe(average)} if averages is not None and average else {}

    def _is_sampled(self, average: str | None) -> bool:
        """Whether the run's samples are of the weights that are written."""
        averages = self.state.averages
        return averages is None or (average or averages.in_use) == averages.evaluated

    def _file(self, average: str | None = None) -> dict[str, Any]:
        """What a file is made of, besides its metadata."""
        state, dtype = self.state, getattr(torch, self.job.config.lora.save_dtype)
        if average is None:
            tensors = state.master_weights.named_state()
        else:
            assert state.averages is not None
            tensors = state.averages.named_state(average)
        return {"architecture": self.job.model.NAME, "state": tensors, "dtype": dtype}

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
