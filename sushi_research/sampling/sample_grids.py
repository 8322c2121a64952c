"""Sample grids of a run: images of the same prompts and seeds at step 0, during training and at the end.

samples/step-00000250/00-seed0.png    one image
samples/step-00000250.png             all images of the step
samples/progress.png                  one row per prompt and seed, one column per step
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
from sushi_research.files import require_same_folder, write_image
from sushi_research.models import loading
from sushi_research.runs import tracking
from sushi_research.runs.job import Job
from sushi_research.sampling import pipeline, plots

_STEP = re.compile(r"step-(\d{8,})")
MOST_COLUMNS = 8
# Key of the PNG text entry that holds the image's prompt.
LABEL = "prompt"


def generate(job: Job, inputs: Inputs, unet: Any, step: int) -> None:
    """Generates and saves images of every prompt and seed with the UNet at `step`. The main process works, the others wait.

    If the step's grid exists already, nothing is done; a resumed run thus generates only what is missing. Only the configured
    seeds determine the noise, and no training random state is used, so sampling does not change the training.
    """
    config, run, accelerator = job.config, job.run, job.accelerator
    folder = run.samples / f"step-{step:08d}"
    grid_path = folder.with_suffix(".png")  # written last
    with job.main_process_writes():
        if job.is_main and config.sample.enabled and not grid_path.exists():
            try:
                images = generate_images(job, inputs, unet)
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"out of memory while generating the samples of step {step}: make them smaller with --sample.width and "
                    "--sample.height, or turn them off with --sample.enabled false (scripts/sample.py samples from the finished "
                    "adapter)."
                ) from error
            rows = rows_of(config, inputs.prompts)
            write_pictures(folder, rows, images)
            labels = [label for _, label in rows]
            write_image(grid_path, plots.grid([[image] for image in images], labels, [f"step {step}"]))
            write_image(run.samples / "progress.png", progress_grid(run.samples, rows))
            tracking.log_images(accelerator, "samples", [folder / name for name, _ in rows], labels, step)
            tracking.log_images(accelerator, "progress", [run.samples / "progress.png"], [f"up to step {step}"], step)


def generate_images(
    job: Job, inputs: Inputs, unet: Any, text: Callable[[str], dict[str, torch.Tensor]] | None = None
) -> list[Image.Image]:
    """Images of every prompt and seed of the config, in the order of `rows_of`.

    `text` encodes a prompt in place of the cached embeddings, for an adapter that changes the text encoders.
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
    labels = [label for _, label in rows_of(config, inputs.prompts)]
    images = pipeline.decode(vae, latents, model.SCALING_FACTOR, labels)
    del vae
    free_memory()
    return images


def write_pictures(folder: Path, rows: Sequence[tuple[str, str]], images: Sequence[Image.Image]) -> None:
    """Saves images under the names of `rows_of`, with their labels as PNG text."""
    require_same_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for (name, label), image in zip(rows, images, strict=True):
        info = PngInfo()
        info.add_text(LABEL, label)
        write_image(folder / name, image, pnginfo=info)


def progress_grid(folder: Path, rows: Sequence[tuple[str, str]]) -> Image.Image:
    """The grid of all steps so far; `rows` are (file name, label). Shows at most eight steps, including the first and last.

    Steps with other prompts are skipped: prompts may change when a run is resumed.
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
            with Image.open(folder / f"step-{step:08d}" / name) as image:
                cells[-1].append(image.convert("RGB"))
    return plots.grid(cells, [label for _, label in rows], [f"step {step}" for step in steps])


def _shows(path: Path, label: str) -> bool:
    """Whether the file exists and has this label."""
    if not path.is_file():
        return False
    with Image.open(path) as image:
        return image.info.get(LABEL) == label


def cut_back(folder: Path, step: int) -> None:
    """Removes images of steps after `step`, from which the run resumes."""
    require_same_folder(folder)
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
    """(file name, label) of each image, in the order of `pipeline.generate_latents`."""
    seeds = config.sample.seeds
    return [
        (f"{number:02d}-seed{seed}.png", prompt if len(seeds) == 1 else f"{prompt} (seed {seed})")
        for number, prompt in enumerate(prompts)
        for seed in seeds
    ]
