"""Draws one grid from a base and adapters at several strengths: what did the adapter change, and how strong should it be?

    python scripts/sample.py --base stabilityai/stable-diffusion-xl-base-1.0 --variant fp16 \\
        --adapters '[runs/mine/adapter.safetensors]' --strengths '[0.5, 0.8, 1.0]' --prompts '[a photo of sks dog]'

Rows are prompts and seeds; columns are the base, then each adapter alone at each strength. The same seed starts from the same
noise in every column.
"""

from __future__ import annotations

from sushi_research.command_line import read_command_line, run_main
from sushi_research.drawing_config import DrawingConfig

INTRO = """\
This draws a grid of pictures from a base and adapters. To begin:
  the base alone:   python scripts/sample.py --base BASE --prompts '[a cat]'
  with an adapter:  python scripts/sample.py --base BASE --prompts '[a cat]' --adapters '[runs/NAME/adapter.safetensors]'
  its strength:     ... --strengths '[0.25, 0.5, 0.75, 1.0]' --seeds '[0, 1]'
  every option:     python scripts/sample.py --help"""

if __name__ == "__main__":
    CONFIG = read_command_line(DrawingConfig, script="scripts/sample.py", intro=INTRO)

import importlib
import logging
import os
import textwrap
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import safe_open

from sushi_research import pictures, sampling, training
from sushi_research.errors import UserError
from sushi_research.files import disk_error
from sushi_research.models import detect, loading
from sushi_research.precision import COMPUTE_DTYPES, resolve_precision
from sushi_research.progress import progress

# How the two matrices of a pair are called: by kohya and most others, by peft, by diffusers before peft.
DOWN = (".lora_down.weight", ".lora_A.weight", ".lora.down.weight")
UP = (".lora_up.weight", ".lora_B.weight", ".lora.up.weight")


def main(config: DrawingConfig) -> int:
    """Draws the grid that `config` describes; returns 0."""
    training.quiet_libraries()
    output = Path(config.output)
    singles = make_folders(output)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base = loading.resolve_base(
        config.base,
        revision=config.revision,
        variant=config.variant,
        vae=config.vae,
        text_encoders=config.text_encoders,
        tokenizers=config.tokenizers,
        prediction_type=config.prediction_type,
        zero_terminal_snr=config.zero_terminal_snr,
    )
    model = importlib.import_module(f"sushi_research.models.{base.architecture}")
    settings = text_settings(config, model)
    loading.require_vae(base, model.SCALING_FACTOR)
    precision = resolve_precision(config.precision, os.environ.get("ACCELERATE_MIXED_PRECISION"), device)
    text = model.load_text(base, device, COMPUTE_DTYPES[precision])
    pipeline = load_pipeline(base, model, text, COMPUTE_DTYPES[precision], device)
    names = load_adapters(pipeline, config.adapters)

    columns = [("base", None, 0.0)]
    columns += [(f"{label} {strength:g}", name, strength) for name, label in names for strength in config.strengths]
    rows = [(prompt, seed) for prompt in config.prompts for seed in config.seeds]
    latents = []
    bar = progress(total=len(rows) * len(columns), description="drawing", unit="picture")
    for _, name, strength in columns:
        if name is not None:
            pipeline.enable_lora()
            pipeline.set_adapters([name], [strength])
        elif names:
            pipeline.disable_lora()
        # In each column anew: an adapter of another trainer may change the text encoders. And not by the pipeline, whose
        # clip_skip does not work with transformers 5.
        negative, _ = model.encode_caption(text, config.negative_prompt, **settings)
        if not config.negative_prompt:
            negative = sampling.unconditional(negative, base.force_zeros)
        prompts = {prompt: model.encode_caption(text, prompt, **settings)[0] for prompt in config.prompts}
        for prompt, seed in rows:
            drawn = pipeline(
                **sampling.embeddings(prompts[prompt], negative, pipeline.unet),
                generator=torch.Generator("cpu").manual_seed(seed),
                num_inference_steps=config.steps,
                guidance_scale=config.guidance or model.GUIDANCE,
                width=config.width,
                height=config.height,
                output_type="latent",
            )
            latents.append(drawn.images)
            bar.update()
    bar.close()
    del pipeline

    vae = loading.load_vae(base, loading.vae_dtype(base, device), device)
    drawn = sampling.decode(vae, latents, model.SCALING_FACTOR)
    cells = [drawn[row :: len(rows)] for row in range(len(rows))]
    for row, cell_row in enumerate(cells):
        for column, picture in enumerate(cell_row):
            picture.save(singles / f"{row:02d}-{column:02d}.png")
    labels = [prompt if len(config.seeds) == 1 else f"{prompt} (seed {seed})" for prompt, seed in rows]
    pictures.grid(cells, labels, [label for label, _, _ in columns]).save(output)
    print(f"written: {output}, and each picture in {singles}/")
    return 0


def make_folders(output: Path) -> Path:
    """Makes the folder of the single pictures, beside the grid, and returns it; UserError where that cannot be."""
    if output.suffix.lower() not in (".png", ".jpg", ".webp"):
        raise UserError(f"output is {output}: give a file that ends in .png, .jpg or .webp.")
    singles = output.with_suffix("")
    try:
        singles.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(f"output: cannot make the folder {singles}", error) from error
    return singles


def load_pipeline(base: loading.Base, model: ModuleType, text: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """diffusers' pipeline of the base without its VAE, with the Euler scheduler that the training's samples use."""
    import diffusers

    pipeline = getattr(diffusers, model.PIPELINE)(
        unet=loading.load_unet(base, dtype, device).eval(),
        vae=None,
        scheduler=sampling.sampling_scheduler(base.scheduler, base.prediction),
        **model.pipeline_text(base, text),
        **model.PIPELINE_WITHOUT,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def text_settings(config: DrawingConfig, model: ModuleType) -> dict[str, int]:
    """How a prompt is encoded; UserError where the base has no such choice."""
    if "clip_skip" in model.TEXT_SETTINGS:
        return {"clip_skip": config.clip_skip}
    if config.clip_skip != 1:
        raise UserError(
            f"clip_skip is {config.clip_skip}, and {detect.NAMES[model.NAME]} base has none: leave it at 1."
        )
    return {}


def load_adapters(pipeline: Any, paths: list[str]) -> list[tuple[str, str]]:
    """(name in the pipeline, label) of each adapter file; UserError for one that does not fit the base, all of it."""
    import diffusers.utils.logging

    # diffusers logs what it raises too, a line for every weight that does not fit.
    diffusers.utils.logging.set_verbosity(logging.CRITICAL)
    # Several adapters side by side are what is wanted here; peft warns of them.
    warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
    names = []
    for number, path in enumerate(paths):
        if not Path(path).is_file():
            raise UserError(f"the adapter {path} is not there: give the path of a .safetensors file.")
        name = f"adapter_{number}"
        try:
            with safe_open(path, "pt") as file:
                keys = set(file.keys())
            pipeline.load_lora_weights(path, adapter_name=name)
        except Exception as error:
            # safetensors and diffusers raise many kinds here; all of them mean that the file is no adapter for this base.
            reason = textwrap.shorten(str(error) or type(error).__name__, 160, placeholder=" ...")
            raise UserError(
                f"the adapter {path} does not fit the base: was it trained for another one, or cut short? ({reason})"
            ) from error
        require_whole(pipeline, name, path, keys)
        # A run's file is called adapter.safetensors: its folder tells more.
        file = Path(path)
        names.append((name, file.resolve().parent.name if file.stem == "adapter" else file.stem))
    return names


def require_whole(pipeline: Any, name: str, path: str, keys: set[str]) -> None:
    """Refuses an adapter file of which diffusers left something out: that picture would not be the adapter's."""
    from peft.tuners.lora import LoraLayer

    downs = {key for key in keys if key.endswith(DOWN)}
    others = {key for key in keys - downs if not key.endswith((*UP, ".alpha"))}
    if others:
        raise UserError(
            f"the adapter {path} holds more than low-rank pairs ({min(others)}), which cannot be drawn here."
        )
    parts = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    layers = [layer for part in parts for layer in part.modules() if isinstance(layer, LoraLayer)]
    used = sum(name in layer.lora_A for layer in layers)
    if used != len(downs):
        raise UserError(
            f"the adapter {path} has {len(downs)} modules, of which {used} fit the base: was it trained for another one?"
        )


if __name__ == "__main__":
    run_main(main, CONFIG)
