"""The pictures of a run's evaluations (evaluation/pictures.py): generated, measured, saved and logged.

pictures/step-00000250/00-learned-seed0.png    one picture, with its prompt as PNG text; those of step 0 are the base's
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sushi_research import stopping
from sushi_research.adapters.lora import without_adapter
from sushi_research.caches.inputs import Inputs
from sushi_research.caches.store import Store
from sushi_research.errors import UserError
from sushi_research.evaluation import pictures
from sushi_research.evaluation.pictures import Encode, Generated, PictureSet
from sushi_research.evaluation.results import Results
from sushi_research.runs import tracking
from sushi_research.runs.job import Job
from sushi_research.sampling import plots, sample_grids


@dataclass(frozen=True)
class PictureEvaluator:
    """A run's picture sets, each with the file of its results, and the store that holds the base's pictures.

    `text` encodes a caption in place of the cached embeddings, with text encoders that are trained.
    """

    inputs: Inputs
    results: Mapping[PictureSet, Results]
    store: Store
    text: Encode | None = None


@contextlib.contextmanager
def advice(what: str) -> Iterator[None]:
    """A block that raises a UserError with advice if the device runs out of memory while doing `what`."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of memory while {what}: make them smaller with --sample.width and --sample.height (those of held-out captions "
            "have the size of their images: lower --data.resolution), or turn them off with --evaluation.pictures 0."
        ) from error


def add_base(job: Job, inputs: Inputs, sets: Sequence[PictureSet], store: Store, unet: Any) -> None:
    """Adds the base's pictures that the store lacks; the processes share the work. UserError if the device runs out of memory."""
    what = "generating the base's pictures"
    with advice(what), stopping.doing(what), without_adapter(unet):
        pictures.generate_missing(job, inputs, unet, sets, store)
    job.accelerator.wait_for_everyone()
    store.refresh()


def evaluate(job: Job, evaluator: PictureEvaluator, unet: Any, step: int) -> None:
    """Generates, measures and saves the pictures of the UNet as it is at `step`. The main process works, the others wait.

    What is on record is not recorded again, and if the step's images are whole too, nothing is generated. No training random state
    is used, so this does not change the training. If the images cannot be written, a warning says so, and the run goes on; the
    base's images of step 0 are then written with those of a later step. Raises UserError if the device runs out of memory.
    """
    with job.main_process_writes():
        if job.is_main:
            with advice(f"generating the pictures of step {step}"):
                _evaluate(job, evaluator, unet, step)


def _evaluate(job: Job, evaluator: PictureEvaluator, unet: Any, step: int) -> None:
    missing = [each for each, results in evaluator.results.items() if results.loss_at(each, step) is None]
    if not missing and _are_written(job, evaluator, step):
        return
    generated = _generate(job, evaluator, unet, step)
    for each in generated:
        if each.picture_set in missing:
            evaluator.results[each.picture_set].append(each.picture_set, step, each.distance, each.base_distance)
    written = _write(job, evaluator, generated, step)
    if written and step > 0 and job.start is None and not _are_written(job, evaluator, 0):
        _write(job, evaluator, _generate(job, evaluator, unet, 0), 0)


def _generate(job: Job, evaluator: PictureEvaluator, unet: Any, step: int) -> list[Generated]:
    """The pictures of a step. Those of step 0 are the base's, because a new adapter begins without effect."""
    of_step = unet if step > 0 or job.start else None
    inputs, store, text = evaluator.inputs, evaluator.store, evaluator.text
    return [pictures.generate(job, inputs, each, store, of_step, text) for each in evaluator.results]


def _write(job: Job, evaluator: PictureEvaluator, generated: Sequence[Generated], step: int) -> bool:
    """Decodes, saves and logs the pictures of a step; returns whether they could be written."""
    images = pictures.decode(job, evaluator.inputs, generated)
    with plots.optional(f"the run goes on without the pictures of step {step}"):
        folder, rows = _folder(job, step), pictures.rows_of([*evaluator.results])
        sample_grids.write_pictures(folder, rows, images)
        files, prompts = [folder / name for name, _ in rows], [prompt for _, prompt in rows]
        tracking.log_images(job.accelerator, "pictures", files, prompts, step)
        return True
    return False


def _are_written(job: Job, evaluator: PictureEvaluator, step: int) -> bool:
    return sample_grids.is_whole(_folder(job, step), pictures.rows_of([*evaluator.results]))


def _folder(job: Job, step: int) -> Path:
    assert job.run is not None
    return sample_grids.step_folder(job.run.pictures, step)
