"""What a run measures of itself, before, on the way and at the end: the loss on the held-out pack, and the drift from the base.

evaluation.parquet and drift.parquet are the record; metrics.jsonl and the trackers get their means with standard errors. All
processes share the work, and the result does not depend on their number (evaluation.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from sushi_research.adapters.lora import without_adapter
from sushi_research.caches.caches import Caches
from sushi_research.caches.store import Store
from sushi_research.config import TrainingConfig
from sushi_research.data.training_data import Data, drift_captions
from sushi_research.errors import UserError
from sushi_research.evaluation import drift, validation_set
from sushi_research.evaluation.drift import Drift
from sushi_research.evaluation.results import Measured, Results
from sushi_research.models import loading
from sushi_research.runs import tracking
from sushi_research.runs.run_folder import RunFolder
from sushi_research.training.precision import COMPUTE_DTYPES

if TYPE_CHECKING:
    from sushi_research.training.resume import Start


@dataclass
class Assessment:
    """The packs of a run, and what it takes to measure on them."""

    pack: validation_set.Pack
    results: Results
    drift: Drift | None
    drift_results: Results
    model: ModuleType
    caches: Caches
    base: loading.Base
    every: int | None
    base_loss: np.ndarray | None = None


def prepare(
    config: TrainingConfig,
    run: RunFolder,
    start: Start,
    base: loading.Base,
    model: ModuleType,
    data: Data,
    caches: Caches,
    unet: Any,
    precision: str,
    accelerator: Accelerator,
) -> Assessment | None:
    """Makes ready what the run is measured on; None where it is not evaluated. `unet` has its adapter.

    Drawings by the base that the drift pack lacks are drawn now; they lie beside the caches, and runs share them.
    """
    if start.pack is None:
        return None
    base_hash = start.hashes["base_model"]["unet"]
    measure = open_drift(config, base, base_hash, model, data, caches, unet, precision, accelerator)
    results, drift_results = Results(run.evaluation), Results(run.drift)
    return Assessment(start.pack, results, measure, drift_results, model, caches, base, config.evaluation.every)


def open_drift(
    config: TrainingConfig,
    base: loading.Base,
    base_hash: str,
    model: ModuleType,
    data: Data,
    caches: Caches,
    unet: Any,
    precision: str,
    accelerator: Accelerator,
) -> Drift | None:
    """What the drift is measured with, None where no caption is given; draws with the base what its pack lacks."""
    captions = drift_captions(config, data)
    if not captions:
        return None
    pack = drift.make_pack(
        captions,
        caches.text_key,
        model,
        base,
        base_hash,
        side=config.data.resolution,
        dtype=COMPUTE_DTYPES[precision],
    )
    store = open_drawings(Path(config.cache.folder), model, accelerator)
    with without_adapter(unet):
        rank, world = accelerator.process_index, accelerator.num_processes
        drift.draw_missing(pack, store, caches.text, model, base, unet, rank=rank, world=world)
    accelerator.wait_for_everyone()
    store.refresh()
    return Drift(pack, store, caches.text, model, base, **sharing(accelerator))


def open_drawings(folder: Path, model: ModuleType, accelerator: Accelerator) -> Store:
    """The store of what bases drew, beside the caches."""
    with accelerator.main_process_first():
        return Store.open(folder / f"drawings_{model.NAME}", drift.TENSORS, repair=accelerator.is_main_process)


def sharing(accelerator: Accelerator) -> dict[str, Any]:
    """How the processes share an evaluation, as the arguments of `evaluation.losses` and `Drift`."""
    reduce: Callable[[torch.Tensor], torch.Tensor] | None = None
    if accelerator.num_processes > 1:
        reduce = lambda found: accelerator.reduce(found, "sum")  # noqa: E731
    return {
        "device": accelerator.device,
        "rank": accelerator.process_index,
        "world": accelerator.num_processes,
        "reduce": reduce,
    }


def assess(
    assessment: Assessment,
    unet: Any,
    step: int,
    steps: int,
    metrics: tracking.MetricsFile,
    accelerator: Accelerator,
) -> None:
    """Measures the UNet as it stands at `step`, where that is the first, the last, or one of every so many.

    What was measured already stays, so a run that continues makes up for what was cut off and no more. Neither the adapter,
    its gradients nor any random stream is touched: evaluating changes no result.
    """
    due = step in (0, steps) or (assessment.every is not None and step % assessment.every == 0)
    if not due:
        return
    try:
        values = _loss(assessment, unet, step, accelerator) | _drift(assessment, unet, step, accelerator)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of memory while evaluating at step {step}: close other programs that use the device, or train without "
            "(--evaluation.held_out 0 or no --evaluation.path) and measure the finished adapter with scripts/evaluate.py."
        ) from error
    if accelerator.is_main_process and not any(
        record["step"] == step and "evaluation/loss" in record for record in metrics.read()
    ):
        tracking.log(accelerator, metrics, values, step)
        tqdm.write(f"step {step}: {describe(values)}")


def describe(values: dict[str, float]) -> str:
    """An evaluation as a person reads it."""

    def with_error(name: str, form: str) -> str:
        error = f" +- {values[f'{name}_se']:.2g}" if f"{name}_se" in values else ""
        return f"{values[name]:{form}}{error}"

    text = f"held-out loss {with_error('evaluation/loss', '.5f')}, over the base "
    text += with_error("evaluation/loss_over_base", "+.5f")
    return f"{text}, drift {with_error('evaluation/drift', '.3g')}" if "evaluation/drift" in values else text


def _loss(assessment: Assessment, unet: Any, step: int, accelerator: Accelerator) -> dict[str, float]:
    pack, results = assessment.pack, assessment.results
    loss, base = _recorded(results, pack, step, accelerator)
    if assessment.base_loss is None:
        assessment.base_loss = base

    def measure() -> np.ndarray:
        prediction = assessment.base.prediction
        return validation_set.losses(
            pack, assessment.model, unet, assessment.caches, prediction, **sharing(accelerator)
        )

    if assessment.base_loss is None:
        with without_adapter(unet):
            assessment.base_loss = measure()
    if loss is None:
        loss = measure()
        if accelerator.is_main_process:
            results.append(pack, step, loss, assessment.base_loss)
    return validation_set.summary(loss, assessment.base_loss, pack.timesteps())


def _drift(assessment: Assessment, unet: Any, step: int, accelerator: Accelerator) -> dict[str, float]:
    measure, results = assessment.drift, assessment.drift_results
    if measure is None:
        return {}
    found, _ = _recorded(results, measure.pack, step, accelerator)
    if found is None:
        if not measure.knows_base:
            with without_adapter(unet):
                measure.remember_base(unet)
        found = measure.measure(unet)
        if accelerator.is_main_process:
            results.append(measure.pack, step, found, np.zeros_like(found))
    return drift.summary(found)


def _recorded(
    results: Results, pack: Measured, step: int, accelerator: Accelerator
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """(the losses at the step, the base's) as the main process has them on record; None for what it has not."""
    found = [None, None]
    if accelerator.is_main_process:
        found = [results.loss_at(pack, step), results.base_loss(pack)]
    loss, base = broadcast_object_list(found)
    return loss, base
