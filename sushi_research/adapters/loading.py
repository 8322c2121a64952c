"""Adapter files of any trainer on a base, by diffusers' own loaders, and a refusal of what loads by half."""

from __future__ import annotations

import logging
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from sushi_research.errors import UserError
from sushi_research.models import loading
from sushi_research.sampling.pipeline import sampling_scheduler

# How the two matrices of a pair are called: by kohya and most others, by peft, by diffusers before peft.
DOWN = (".lora_down.weight", ".lora_A.weight", ".lora.down.weight")
UP = (".lora_up.weight", ".lora_B.weight", ".lora.up.weight")
# What the keys of the text encoders' part begin with: kohya's, and peft's or diffusers'.
TEXT = ("lora_te", "text_encoder")


def load_pipeline(base: loading.Base, model: ModuleType, text: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """diffusers' pipeline of the base without its VAE, with the Euler scheduler that the training's samples use."""
    import diffusers

    pipeline = getattr(diffusers, model.PIPELINE)(
        unet=loading.load_unet(base, dtype, device).eval(),
        vae=None,
        scheduler=sampling_scheduler(base.scheduler, base.prediction),
        **model.pipeline_text(base, text),
        **model.PIPELINE_WITHOUT,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_adapters(pipeline: Any, paths: Sequence[str]) -> list[tuple[str, str]]:
    """(name in the pipeline, label) of each adapter file; UserError for one that does not fit the base, all of it."""
    import diffusers.utils.logging
    from safetensors import safe_open

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
        names.append((name, label_of(Path(path))))
    return names


def label_of(file: Path) -> str:
    """What an adapter file is called in a table. A run's file is called adapter.safetensors: its folder tells more."""
    return file.resolve().parent.name if file.stem == "adapter" else file.stem


def adapts_text(path: str) -> bool:
    """Whether an adapter file changes the text encoders too, so that cached embeddings are not what it sees."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return any(key.startswith(TEXT) for key in file.keys())


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
