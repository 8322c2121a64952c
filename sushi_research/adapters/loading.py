"""Loads adapter files of any trainer onto a base with diffusers' loaders; refuses files that load only in part."""

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

# Key suffixes of the two matrices: of kohya and most others, of peft, of diffusers before it used peft.
DOWN = (".lora_down.weight", ".lora_A.weight", ".lora.down.weight")
UP = (".lora_up.weight", ".lora_B.weight", ".lora.up.weight")
# Key prefixes of text-encoder layers: kohya's, and peft's and diffusers'.
TEXT = ("lora_te", "text_encoder")


def load_pipeline(base: loading.Base, model: ModuleType, text: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """diffusers' pipeline of the base without its VAE and scheduler; for sampling, set `scheduler` (`sampling_scheduler`)."""
    import diffusers

    pipeline = getattr(diffusers, model.PIPELINE)(
        unet=loading.load_unet(base, dtype, device).eval(),
        vae=None,
        scheduler=None,
        **model.pipeline_text(base, text),
        **model.PIPELINE_WITHOUT,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_adapters(pipeline: Any, paths: Sequence[str]) -> list[tuple[str, str]]:
    """Loads the adapter files; returns (name in the pipeline, label) of each. UserError if one does not fit the base fully."""
    import diffusers.utils.logging
    from safetensors import safe_open

    # diffusers logs a line for every weight that does not fit, in addition to raising an error.
    diffusers.utils.logging.set_verbosity(logging.CRITICAL)
    # peft warns when several adapters are loaded, which is intended here.
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
            # safetensors and diffusers raise many error types here; all mean that the file is not an adapter for this base.
            reason = textwrap.shorten(str(error) or type(error).__name__, 160, placeholder=" ...")
            raise UserError(
                f"the adapter {path} does not fit the base: was it trained for another one, or cut short? ({reason})"
            ) from error
        require_whole(pipeline, name, path, keys)
        names.append((name, label_of(Path(path))))
    return names


def label_of(file: Path) -> str:
    """Label of an adapter file in tables: its stem, or its folder's name for a run's adapter.safetensors."""
    return file.resolve().parent.name if file.stem == "adapter" else file.stem


def adapts_text(path: str) -> bool:
    """Whether an adapter file also changes the text encoders, so that cached text embeddings cannot be used."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return any(key.startswith(TEXT) for key in file.keys())


def require_whole(pipeline: Any, name: str, path: str, keys: set[str]) -> None:
    """UserError if diffusers skipped a part of the adapter file: samples would not show the whole adapter."""
    from peft.tuners.lora import LoraLayer

    downs = {key for key in keys if key.endswith(DOWN)}
    others = {key for key in keys - downs if not key.endswith((*UP, ".alpha"))}
    if others:
        raise UserError(
            f"the adapter {path} holds tensors that are not LoRA pairs ({min(others)}), which cannot be loaded here."
        )
    parts = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    layers = [layer for part in parts for layer in part.modules() if isinstance(layer, LoraLayer)]
    used = sum(name in layer.lora_A for layer in layers)
    if used != len(downs):
        raise UserError(
            f"the adapter {path} has {len(downs)} modules, of which {used} fit the base: was it trained for another one?"
        )
