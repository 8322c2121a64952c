"""Sample grids of a run: images of the same prompts and seeds at step 0, during training and at the end.

samples/step-00000250/00-seed0.png    one image
samples/step-00000250.png             all images of the step
samples/progress.png                  one row per prompt and seed, one column per step
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sushi_research.caches.caches import free_memory
from sushi_research.caches.inputs import Inputs
from sushi_research.config import TrainingConfig
from sushi_research.config.prompts import Prompt
from sushi_research.errors import UserError
from sushi_research.files import make_folder, remove, write_image
from sushi_research.models import loading
from sushi_research.runs import tracking
from sushi_research.runs.job import Job
from sushi_research.sampling import pipeline, plots, prompts

_STEP = re.compile(r"step-(\d{8,})")
MOST_COLUMNS = 8
# Key of the PNG text entry that holds the image's prompt.
LABEL = "prompt"


def generate(
    job: Job,
    inputs: Inputs,
    unet: Any,
    step: int,
    without_adapter: Callable[[Any], AbstractContextManager[None]] | None = None,
    *,
    text: Callable[[str, float], dict[str, torch.Tensor]] | None = None,
) -> None:
    """Generates and saves images of every prompt and seed with the UNet at `step`. The main process works, the others wait.

    If the step's pictures are whole, nothing is done; a resumed run thus generates only what is missing. Only the configured
    seeds determine the noise, and no training random state is used, so sampling does not change the training. If the images
    cannot be written, for example because the disk is full, a warning says so, and the training goes on without them. If those of
    step 0 are missing, they are generated after those of `step`, with the UNet in the context of `without_adapter`, unless the run
    starts from an adapter file. `text` is that of `generate_images`.
    """
    with job.main_process_writes():
        if not (job.is_main and job.config.sample.enabled and _problems(job.run.samples, step)):
            return
        written = _generate_step(job, inputs, unet, step, text)
        is_known = without_adapter is not None and job.start is None
        if written and step > 0 and is_known and _problems(job.run.samples, 0):
            with without_adapter(unet):  # what a new adapter does before its first step
                _generate_step(job, inputs, unet, 0, text)


def _generate_step(job: Job, inputs: Inputs, unet: Any, step: int, text: Any) -> bool:
    """Generates, saves and logs the images of a step; returns whether they could be written."""
    samples, rows = job.run.samples, rows_of(job.config, inputs.prompts)
    try:
        images = generate_images(job, inputs, unet, text)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of memory while generating the samples of step {step}: make them smaller with --sample.width and "
            "--sample.height, or turn them off with --sample.enabled false (scripts/sample.py samples from the finished "
            "adapter)."
        ) from error
    with plots.optional(f"the run goes on without the samples of step {step}"):
        write_pictures(step_folder(samples, step), rows, images)
        _write_grids(samples, rows, step, images)
        labels, files = [label for _, label in rows], [step_folder(samples, step) / name for name, _ in rows]
        tracking.log_images(job.accelerator, "samples", files, labels, step)
        tracking.log_images(job.accelerator, "progress", [samples / "progress.png"], [f"up to step {step}"], step)
        return True
    return False


def lost(samples: Path, step: int, rows: Sequence[tuple[str, str]]) -> dict[Path, str]:
    """What is wrong with each picture of a step that is missing or damaged, as a sentence; {} if `complete_grids` can make them.

    Images of other prompts count, because prompts may change when a run is resumed. {} for no rows.
    """
    return {} if not rows or is_whole(step_folder(samples, step), rows) else _problems(samples, step)


def _problems(samples: Path, step: int) -> dict[Path, str]:
    """What is wrong with the grid of a step and with each of the step's images."""
    pictures = [_grid_path(samples, step), *sorted(step_folder(samples, step).glob("*.png"))]
    return {path: f"{path} {problem}" for path in pictures if (problem := plots.picture_problem(path))}


def step_folder(samples: Path, step: int) -> Path:
    """The folder of the single images of a step."""
    return samples / f"step-{step:08d}"


def latest_grid(samples: Path) -> tuple[int, Path] | None:
    """The latest step that has a grid, and the grid."""
    found = ((_STEP.fullmatch(path.stem), path) for path in samples.glob("step-*.png"))
    return max(((int(match[1]), path) for match, path in found if match), default=None)


def _grid_path(samples: Path, step: int) -> Path:
    """The grid of a step. It is written last, so the step's images are complete if it exists."""
    return samples / f"step-{step:08d}.png"


def complete_grids(
    samples: Path, rows: Sequence[tuple[str, str]], next_step: int | None = None, again: bool = False
) -> list[str]:
    """Writes the grids that are missing or damaged of those steps whose images are whole.

    A missing one could not be written, or was interrupted. `next_step` is the step at which the run goes on: later images are
    removed, and if it is `again` a step with samples, its images are made again. Returns a sentence for each damaged picture.
    """
    found = []
    for step in steps_of(samples) if rows else ():
        problems, folder = _problems(samples, step), step_folder(samples, step)
        outcome = "its step is left out of progress.png"
        if problems and is_whole(folder, rows):
            _write_grids(samples, rows, step, _images(folder, rows))
            outcome = "it is made again"
        elif next_step is not None and step > next_step:
            continue
        elif again and step == next_step:
            outcome = "it is made again"
        found += [f"{problem}: {outcome}" for problem in problems.values() if not problem.endswith(plots.MISSING)]
    progress = samples / "progress.png"
    whole = [step for step in steps_of(samples) if rows and is_whole(step_folder(samples, step), rows)]
    if whole and (problem := plots.picture_problem(progress)):
        write_image(progress, progress_grid(samples, rows))
        found.append(f"{progress} {problem}: it is made again")
    return found


def _write_grids(samples: Path, rows: Sequence[tuple[str, str]], step: int, images: Sequence[Image.Image]) -> None:
    """Writes progress.png, then the grid of `step`, which shows that the step's images are complete."""
    write_image(samples / "progress.png", progress_grid(samples, rows))
    grid = plots.grid([[image] for image in images], [label for _, label in rows], [f"step {step}"])
    write_image(_grid_path(samples, step), grid)


def generate_images(
    job: Job, inputs: Inputs, unet: Any, text: Callable[[str, float], dict[str, torch.Tensor]] | None = None
) -> list[Image.Image]:
    """Images of every prompt and seed of the config, in the order of `rows_of`.

    `text` encodes a prompt for an image of this scale in place of the cached embeddings, for an adapter that changes the text
    encoders.
    """
    images = prompts.of_run(job.config, inputs.prompts)
    requests = []
    for image in images:
        encode = functools.partial(text, scale=image.scale) if text else inputs.prompt_text
        negative = pipeline.negative_of(image.negative_prompt, encode, inputs.base.force_zeros)
        sizes = (image.steps, image.guidance, image.height, image.width, image.scale)
        requests.append(pipeline.Request(encode(image.prompt), negative, image.seed, *sizes))
    generated = pipeline.generate_each(job.model, inputs.base, unet, requests)
    return decode(job, inputs, list(generated), [image.label for image in images])


def decode(job: Job, inputs: Inputs, latents: Sequence[torch.Tensor], labels: Sequence[str]) -> list[Image.Image]:
    """`pipeline.decode` with the base's VAE, which is in memory only for it."""
    vae = loading.load_vae(inputs.base, inputs.caches.vae_dtype, job.device)
    images = pipeline.decode(vae, latents, job.model.SCALING_FACTOR, labels)
    del vae
    free_memory()
    return images


def write_pictures(folder: Path, rows: Sequence[tuple[str, str]], images: Sequence[Image.Image]) -> None:
    """Saves images under the names of `rows_of`, with their labels as PNG text."""
    make_folder(folder)
    for (name, label), image in zip(rows, images, strict=True):
        info = PngInfo()
        info.add_text(LABEL, label)
        write_image(folder / name, image, pnginfo=info)


def progress_grid(folder: Path, rows: Sequence[tuple[str, str]]) -> Image.Image:
    """The grid of all steps so far; `rows` are (file name, label). Shows at most eight steps, including the first and last.

    Steps with other prompts are skipped: prompts may change when a run is resumed. So are steps without all of their images.
    """
    steps = [step for step in steps_of(folder) if is_whole(step_folder(folder, step), rows)]
    if len(steps) > MOST_COLUMNS:
        spaced = {round(i * (len(steps) - 1) / (MOST_COLUMNS - 1)) for i in range(MOST_COLUMNS)}
        steps = [steps[index] for index in sorted(spaced)]
    columns = [_images(step_folder(folder, step), rows) for step in steps]
    return plots.grid(
        list(zip(*columns, strict=True)), [label for _, label in rows], [f"step {step}" for step in steps]
    )


def is_whole(folder: Path, rows: Sequence[tuple[str, str]]) -> bool:
    """Whether all images of a step are there, undamaged and of these prompts."""
    for name, label in rows:
        if plots.picture_problem(folder / name):
            return False
        with Image.open(folder / name) as image:
            if image.info.get(LABEL) != label:
                return False
    return True


def _images(folder: Path, rows: Sequence[tuple[str, str]]) -> list[Image.Image]:
    images = []
    for name, _ in rows:
        with Image.open(folder / name) as image:
            images.append(image.convert("RGB"))
    return images


def cut_back(folder: Path, step: int) -> None:
    """Removes images of steps after `step`, from which the run resumes."""
    for later in steps_of(folder):
        if later > step:
            remove(step_folder(folder, later))
            remove(_grid_path(folder, later))


def steps_of(folder: Path) -> list[int]:
    """The steps that have a folder of images, in order."""
    if not folder.is_dir():
        return []
    found = (_STEP.fullmatch(path.name) for path in folder.iterdir() if path.is_dir())
    return sorted(int(match[1]) for match in found if match)


def rows_of(config: TrainingConfig, entries: Sequence[Prompt]) -> list[tuple[str, str]]:
    """(file name, label) of each image of a list of prompts, in the order of `generate_images`."""
    return [(image.file_name, image.label) for image in prompts.of_run(config, entries)]
