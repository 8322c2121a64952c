"""What a run measures of itself, before, on the way and at the end: the loss on the validation set, and the drift from the base.

evaluation.parquet and drift.parquet are the record; metrics.jsonl and the trackers get their means with standard errors. All
processes share the work, and the result does not depend on their number (validation_set.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from sushi_research.adapters.lora import without_adapter
from sushi_research.caches.inputs import Inputs
from sushi_research.caches.store import Store
from sushi_research.data.training_data import drift_captions
from sushi_research.errors import UserError
from sushi_research.evaluation import drift, validation_set
from sushi_research.evaluation.drift import Drift
from sushi_research.evaluation.results import Measured, Results
from sushi_research.evaluation.validation_set import ValidationSet
from sushi_research.runs import tracking
from sushi_research.runs.job import Job
from sushi_research.training.resume import RunState


@dataclass
class Evaluator:
    """The frozen sets of a run, where their results go, and the base's losses once they are known."""

    inputs: Inputs
    validation_set: ValidationSet
    results: Results
    drift: Drift | None
    drift_results: Results
    base_loss: np.ndarray | None = None


def prepare(job: Job, inputs: Inputs, run_state: RunState, unet: Any) -> Evaluator | None:
    """Gets ready what the run is evaluated on; None where it is not evaluated. `unet` has its adapter.

    Images by the base that the drift needs and the store lacks are generated now; runs share them, as they do the caches.
    """
    if run_state.validation_set is None:
        return None
    assert job.run is not None
    measure = open_drift(job, inputs, run_state.hashes["base_model"]["unet"], unet)
    return Evaluator(inputs, run_state.validation_set, Results(job.run.evaluation), measure, Results(job.run.drift))


def open_drift(job: Job, inputs: Inputs, base_hash: str, unet: Any) -> Drift | None:
    """What the drift is measured with, None where no caption is given; the base generates what the store lacks."""
    config, model, base, caches = job.config, job.model, inputs.base, inputs.caches
    captions = drift_captions(config, inputs.data)
    if not captions:
        return None
    drift_set = drift.make_drift_set(
        captions, caches.text_key, model, base, base_hash, side=config.data.resolution, dtype=job.compute_dtype
    )
    store = open_generated(Path(config.cache.folder), model, job.accelerator)
    with without_adapter(unet):
        drift.generate_missing(drift_set, store, caches.text, model, base, unet, rank=job.rank, world=job.world)
    job.accelerator.wait_for_everyone()
    store.refresh()
    return Drift(drift_set, store, caches.text, model, base, **job.sharing())


def open_generated(folder: Path, model: ModuleType, accelerator: Accelerator) -> Store:
    """The store of what base models generated, next to the caches."""
    with accelerator.main_process_first():
        return Store.open(folder / f"generated_{model.NAME}", drift.TENSORS, repair=accelerator.is_main_process)


def evaluate(job: Job, evaluator: Evaluator, unet: Any, step: int, steps: int, log: tracking.MetricsFile) -> None:
    """Measures the UNet as it is at `step`, where that is the first, the last, or one of every so many.

    What was measured already is kept, so a run that continues makes up for what is missing and no more. Neither the adapter, its
    gradients nor any random stream is touched: evaluating changes no result.
    """
    every = job.config.evaluation.every
    if not (step in (0, steps) or (every is not None and step % every == 0)):
        return
    try:
        values = _loss(job, evaluator, unet, step) | _drift(job, evaluator, unet, step)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of memory while evaluating at step {step}: close other programs that use the device, or train without "
            "(--evaluation.held_out 0 or no --evaluation.path) and measure the finished adapter with scripts/evaluate.py."
        ) from error
    if job.is_main and not any(record["step"] == step and "evaluation/loss" in record for record in log.read()):
        tracking.log(job.accelerator, log, values, step)
        tqdm.write(f"step {step}: {describe(values)}")


def describe(values: dict[str, float]) -> str:
    """An evaluation as a person reads it."""

    def with_error(name: str, form: str) -> str:
        error = f" +- {values[f'{name}_se']:.2g}" if f"{name}_se" in values else ""
        return f"{values[name]:{form}}{error}"

    text = f"validation loss {with_error('evaluation/loss', '.5f')}, over the base "
    text += with_error("evaluation/loss_over_base", "+.5f")
    return f"{text}, drift {with_error('evaluation/drift', '.3g')}" if "evaluation/drift" in values else text


def _loss(job: Job, evaluator: Evaluator, unet: Any, step: int) -> dict[str, float]:
    val_set, results = evaluator.validation_set, evaluator.results
    loss, base = _recorded(job, results, val_set, step)
    if evaluator.base_loss is None:
        evaluator.base_loss = base

    def measure() -> np.ndarray:
        inputs = evaluator.inputs
        return validation_set.losses(val_set, job.model, unet, inputs.caches, inputs.base.prediction, **job.sharing())

    if evaluator.base_loss is None:
        with without_adapter(unet):
            evaluator.base_loss = measure()
    if loss is None:
        loss = measure()
        if job.is_main:
            results.append(val_set, step, loss, evaluator.base_loss)
    return validation_set.summary(loss, evaluator.base_loss, val_set.timesteps())


def _drift(job: Job, evaluator: Evaluator, unet: Any, step: int) -> dict[str, float]:
    measure, results = evaluator.drift, evaluator.drift_results
    if measure is None:
        return {}
    found, _ = _recorded(job, results, measure.drift_set, step)
    if found is None:
        if not measure.knows_base:
            with without_adapter(unet):
                measure.remember_base(unet)
        found = measure.measure(unet)
        if job.is_main:
            results.append(measure.drift_set, step, found, np.zeros_like(found))
    return drift.summary(found)


def _recorded(job: Job, results: Results, measured: Measured, step: int) -> tuple[np.ndarray | None, np.ndarray | None]:
    """(the losses at the step, the base's) as the main process has them on record; None for what it has not."""
    found = [None, None]
    if job.is_main:
        found = [results.loss_at(measured, step), results.base_loss(measured)]
    loss, base = broadcast_object_list(found)
    return loss, base
