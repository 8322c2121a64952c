"""The pictures of a run: the same prompts and seeds at step 0, on the way and at the end, in one grid.

samples/step-00000250/00-seed0.png    one picture
samples/step-00000250.png             the step's pictures
samples/progress.png                  every prompt and seed as a row, the steps as columns
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sushi_research.caches.caches import free_memory
from sushi_research.caches.inputs import Inputs
from sushi_research.config import TrainingConfig
from sushi_research.errors import UserError
from sushi_research.models import loading
from sushi_research.runs import tracking
from sushi_research.runs.job import Job
from sushi_research.sampling import pipeline, plots

_STEP = re.compile(r"step-(\d{8,})")
MOST_COLUMNS = 8
# Under this name a picture's file says what was drawn.
LABEL = "prompt"


def generate(job: Job, inputs: Inputs, unet: Any, step: int) -> None:
    """Draws every prompt with every seed from the UNet as it stands at `step`; the main process draws, the others wait.

    Nothing is drawn where the step's pictures are there already: a run that continues makes up for what was cut off.
    Randomness comes from the seeds alone and the training's own streams are not touched, so drawing changes no result.
    """
    config, run, accelerator = job.config, job.run, job.accelerator
    folder = run.samples / f"step-{step:08d}"
    grid_path = folder.with_suffix(".png")  # written last
    if accelerator.is_main_process and config.sample.enabled and not grid_path.exists():
        try:
            images = generate_images(job, inputs, unet)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"out of memory while drawing the samples of step {step}: draw smaller ones with --sample.width and "
                "--sample.height, or none with --sample.enabled false (scripts/sample.py draws from the finished adapter)."
            ) from error
        rows = rows_of(config, inputs.prompts)
        write_pictures(folder, rows, images)
        labels = [label for _, label in rows]
        plots.grid([[picture] for picture in images], labels, [f"step {step}"]).save(grid_path)
        progress_grid(run.samples, rows).save(run.samples / "progress.png")
        tracking.log_images(accelerator, "samples", [folder / name for name, _ in rows], labels, step)
        tracking.log_images(accelerator, "progress", [run.samples / "progress.png"], [f"up to step {step}"], step)
    accelerator.wait_for_everyone()


def generate_images(
    job: Job, inputs: Inputs, unet: Any, text: Callable[[str], dict[str, torch.Tensor]] | None = None
) -> list[Image.Image]:
    """The pictures of every prompt and seed of the config, in the order of `rows_of`.

    `text` encodes a prompt where the cached embedding is not the right one, as for an adapter of the text encoders.
    """
    config, base, model = job.config, inputs.base, job.model
    text = text or inputs.caches.text
    negative = text(config.sample.negative_prompt)
    if not config.sample.negative_prompt:
        negative = pipeline.unconditional(negative, base.force_zeros)
    latents = pipeline.generate_latents(
        model,
        base,
        unet,
        [text(prompt) for prompt in inputs.prompts],
        negative,
        seeds=config.sample.seeds,
        steps=config.sample.steps,
        guidance=config.sample.guidance,
        height=config.sample.height or config.data.resolution,
        width=config.sample.width or config.data.resolution,
    )
    vae = loading.load_vae(base, inputs.caches.vae_dtype, job.device)
    images = pipeline.decode(vae, latents, model.SCALING_FACTOR)
    del vae
    free_memory()
    return images


def write_pictures(folder: Path, rows: Sequence[tuple[str, str]], images: Sequence[Image.Image]) -> None:
    """Saves pictures under the names of `rows_of`, each with its label in it."""
    folder.mkdir(parents=True, exist_ok=True)
    for (name, label), picture in zip(rows, images, strict=True):
        described = PngInfo()
        described.add_text(LABEL, label)
        picture.save(folder / name, pnginfo=described)


def progress_grid(folder: Path, rows: Sequence[tuple[str, str]]) -> Image.Image:
    """The grid of all steps drawn so far: `rows` are (file name, label); at most eight steps, the first and last among them.

    Steps at which other prompts were drawn are skipped: prompts may change when a run continues.
    """
    steps = [
        step
        for step in _steps(folder)
        if all(_shows(folder / f"step-{step:08d}" / name, label) for name, label in rows)
    ]
    if len(steps) > MOST_COLUMNS:
        spaced = {round(i * (len(steps) - 1) / (MOST_COLUMNS - 1)) for i in range(MOST_COLUMNS)}
        steps = [steps[index] for index in sorted(spaced)]
    cells = []
    for name, _ in rows:
        cells.append([])
        for step in steps:
            with Image.open(folder / f"step-{step:08d}" / name) as picture:
                cells[-1].append(picture.convert("RGB"))
    return plots.grid(cells, [label for _, label in rows], [f"step {step}" for step in steps])


def _shows(path: Path, label: str) -> bool:
    """Whether there is a picture of this prompt."""
    if not path.is_file():
        return False
    with Image.open(path) as picture:
        return picture.info.get(LABEL) == label


def cut_back(folder: Path, step: int) -> None:
    """Removes pictures of steps after `step`, where the run goes on."""
    for later in _steps(folder):
        if later > step:
            shutil.rmtree(folder / f"step-{later:08d}")
            (folder / f"step-{later:08d}.png").unlink(missing_ok=True)


def _steps(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    found = (_STEP.fullmatch(path.name) for path in folder.iterdir() if path.is_dir())
    return sorted(int(match[1]) for match in found if match)


def rows_of(config: TrainingConfig, prompts: Sequence[str]) -> list[tuple[str, str]]:
    """(file name, label) of each picture, prompts outermost, as `pipeline.generate_latents` orders them."""
    seeds = config.sample.seeds
    return [
        (f"{number:02d}-seed{seed}.png", prompt if len(seeds) == 1 else f"{prompt} (seed {seed})")
        for number, prompt in enumerate(prompts)
        for seed in seeds
    ]
