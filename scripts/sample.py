"""Generates a grid of images from a base and adapters at several LoRA scales, to see what an adapter changes at which scale.

    python scripts/sample.py --adapters runs/mycat --prompts 'a photo of mycat'
    python scripts/sample.py --base stabilityai/stable-diffusion-xl-base-1.0 --variant fp16 \\
        --adapters other.safetensors --lora_scales '[0.5, 0.8, 1.0]' --prompts 'a photo of sks dog'

Rows are prompts and seeds; columns are the base, then each adapter by itself at each LoRA scale. A seed gives the same initial
noise in every column.
"""

from __future__ import annotations

from sushi_research import models, stopping
from sushi_research.config.other_scripts import SamplingConfig
from sushi_research.config.process import read_command_line, run_main

INTRO = """\
This generates a grid of images from a base and adapters. To begin:
  the base alone:   python scripts/sample.py --base BASE --prompts 'a cat'
  of a run:         python scripts/sample.py --adapters runs/NAME --prompts 'a cat'
  its LoRA scale:   ... --lora_scales '[0.25, 0.5, 0.75, 1.0]' --seeds '[0, 1]'
  every option:     python scripts/sample.py --help"""

if __name__ == "__main__":
    CONFIG = read_command_line(SamplingConfig, script="scripts/sample.py", intro=INTRO)

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from PIL import Image
from pydantic import ValidationError

from sushi_research.adapters import other_prediction, run_files
from sushi_research.adapters.labels import labels_of
from sushi_research.adapters.loading import load_adapters, load_pipeline
from sushi_research.adapters.reading import read_adapter
from sushi_research.config.prompts import as_prompts, read_prompts
from sushi_research.errors import UserError
from sushi_research.evaluation.adapter_files import require_finite
from sushi_research.files import CannotWrite, make_folder, remove, system_errors, write_image
from sushi_research.models import loading
from sushi_research.models.shapes import published
from sushi_research.models.truncation import chunks_of
from sushi_research.precision import COMPUTE_DTYPES, resolve_precision
from sushi_research.progress import progress
from sushi_research.sampling import plots
from sushi_research.sampling import prompts as sample_prompts
from sushi_research.sampling.pipeline import decode, embeddings, negative_of, sampling_scheduler
from sushi_research.terminal import say
from sushi_research.training import run


@system_errors()
def main(config: SamplingConfig) -> int:
    """Generates the grid that `config` describes; returns 0."""
    with stopping.doing("sampling", f"{config.output} is not written; the same command again starts over"):
        sample(config)
    return 0


def sample(config: SamplingConfig) -> None:
    """Generates the grid and writes it, with the single images next to it."""
    run.quiet_libraries()
    output = Path(config.output)
    singles = make_folders(output)
    config = with_base_of_runs(config)
    adapters = run_files.resolve_all(config.adapters)
    prompts = read_prompts(config.prompts_file, "prompts_file") if config.prompts_file else as_prompts(config.prompts)
    for path in adapters:  # fail fast: the base is not loaded yet
        for note in read_adapter(path).notes:
            say(f"note: {note}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base = loading.resolve_base(
        config.base,
        revision=config.revision,
        variant=config.variant,
        vae=config.vae,
        vae_revision=config.vae_revision,
        text_encoders=config.text_encoders,
        tokenizers=config.tokenizers,
        prediction_type=config.prediction_type,
        zero_terminal_snr=config.zero_terminal_snr,
        flow_shift=config.flow_shift,
    )
    base.require_loadable()
    for note in other_prediction.notes(adapters, base.prediction):
        say(f"note: {note}")
    model = models.load(base.architecture)
    settings = text_settings(config, model)
    rows = sample_prompts.expand(prompts, config.seeds, defaults_of(config, base, model))
    chunks = chunks_of(base, model, {text for image in rows for text in (image.prompt, image.negative_prompt)})
    sample_prompts.require_few_chunks(rows, chunks)
    schedulers = {image.steps: sampling_scheduler(base.scheduler, base.prediction, image.steps) for image in rows}
    precision = resolve_precision(config.precision, os.environ.get("ACCELERATE_MIXED_PRECISION"), device).name
    text = model.load_text(base, device, COMPUTE_DTYPES[precision])
    pipeline = load_pipeline(base, model, text, COMPUTE_DTYPES[precision], device)
    labels = labels_of([Path(path) for path in adapters], reserved=["base"])
    loaded = list(zip(load_adapters(pipeline, adapters), labels, strict=True))

    columns: list[tuple[str, Any, float]] = [("base", None, 0.0)]
    columns += [(label, adapter, lora_scale) for adapter, label in loaded for lora_scale in config.lora_scales]
    latents = []
    work = progress(total=len(rows) * len(columns), description="generating images", unit="image", leave=False)
    with work as bar:
        for label, adapter, lora_scale in columns:
            # Encoded again for each column, because an adapter of another trainer may change the text encoders. We do not leave
            # it to the pipeline, whose clip_skip does not work with transformers 5.
            known: dict[tuple[str, float], dict[str, torch.Tensor]] = {}

            def encode(prompt: str, scale: float, known: Any = known) -> dict[str, torch.Tensor]:
                if (prompt, scale) not in known:
                    known[prompt, scale] = model.encode_prompt(text, prompt, **settings)
                return known[prompt, scale]

            for image in rows:
                if adapter is not None:
                    adapter.activate(lora_scale * image.scale)
                of_image = functools.partial(encode, scale=image.scale)
                negative = negative_of(image.negative_prompt, of_image, base.force_zeros)
                pipeline.scheduler = schedulers[image.steps]
                generated = pipeline(
                    **embeddings(of_image(image.prompt), negative, pipeline.unet),
                    generator=torch.Generator("cpu").manual_seed(image.seed),
                    num_inference_steps=image.steps,
                    guidance_scale=image.guidance,
                    width=image.width,
                    height=image.height,
                    output_type="latent",
                )
                require_finite(label, lora_scale, [generated.images.float().cpu().numpy()])
                latents.append(generated.images)
                bar.update()
            if adapter is not None:
                adapter.deactivate()
    del pipeline

    vae = loading.load_vae(base, loading.vae_dtype(base, device), device)
    texts = [f"{label} {lora_scale:g}: {image.label}" for label, _, lora_scale in columns for image in rows]
    generated = decode(vae, latents, model.SCALING_FACTOR, texts)
    cells = [generated[row :: len(rows)] for row in range(len(rows))]
    pictures = {
        singles / f"{row:02d}-{column:02d}.png": image
        for row, cell_row in enumerate(cells)
        for column, image in enumerate(cell_row)
    }
    column_labels = [label if adapter is None else f"{label} {scale:g}" for label, adapter, scale in columns]
    pictures[output] = plots.grid(cells, [image.label for image in rows], column_labels)
    write_all(pictures, singles)
    say(f"written: {output}, and each image in {singles}/")


def with_base_of_runs(config: SamplingConfig) -> SamplingConfig:
    """The config with the base of the run folders among the adapters, if it names none. UserError as `run_files.model_settings`."""
    if config.base is not None:
        return config
    given = {name: getattr(config, name) for name in config.model_fields_set}
    try:
        return SamplingConfig(**given | run_files.model_settings(config.adapters))
    except ValidationError as error:
        key, message = ".".join(map(str, error.errors()[0]["loc"])), error.errors()[0]["msg"]
        raise UserError(
            f"the run's config.yaml has model.{key} of another kind ({message}): restore it, or give --base."
        ) from error


def write_all(pictures: Mapping[Path, Image.Image], singles: Path) -> None:
    """Writes the images by path, and removes those that an earlier, larger grid left in the folder `singles`.

    If some cannot be written, the others are written all the same, and then UserError names the first.
    """
    failed = []
    for path, image in pictures.items():
        try:
            write_image(path, image)
        except CannotWrite as error:
            failed.append(error)
    for path in singles.glob("[0-9][0-9]-[0-9][0-9].png"):
        if path not in pictures:
            remove(path)
    if failed:
        written = f"{len(pictures) - len(failed)} of {len(pictures)} images are written"
        raise UserError(f"{failed[0]} ({written})")


def make_folders(output: Path) -> Path:
    """Creates the folder of the single images next to the grid and returns it; UserError if that fails."""
    if output.suffix.lower() not in (".png", ".jpg", ".webp"):
        raise UserError(f"output is {output}: give a file that ends in .png, .jpg or .webp.")
    singles = output.with_suffix("")
    make_folder(singles)
    return singles


def defaults_of(config: SamplingConfig, base: loading.Base, model: ModuleType) -> dict[str, Any]:
    """The settings of images whose prompt has none of its own. Without a size in the config it is the base's native one."""
    native = base.config("unet").get("sample_size") or published(base.architecture)["unet"]["sample_size"]
    height, width = native if isinstance(native, list) else (native, native)
    return {
        "negative_prompt": config.negative_prompt,
        "width": config.width or 8 * width,
        "height": config.height or 8 * height,
        "steps": config.steps,
        "guidance": config.guidance or model.GUIDANCE,
    }


def text_settings(config: SamplingConfig, model: ModuleType) -> dict[str, int]:
    """Options for encoding a prompt; UserError if clip_skip is set and the base has no such option."""
    if "clip_skip" in model.TEXT_SETTINGS:
        return {"clip_skip": config.clip_skip or 1}
    if config.clip_skip not in (None, 1):
        raise UserError(
            f"clip_skip is {config.clip_skip}, and {models.ARCHITECTURES[model.NAME].title} base has none: leave it at 1."
        )
    return {}


if __name__ == "__main__":
    run_main(main, CONFIG)
