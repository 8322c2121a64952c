"""Which architecture a base is, read from its configs; everything that is not SD1.5 or SDXL base is refused by name.

Decided from the UNet and what feeds it, never by trying to load: the presence of a key means nothing (every UNet config has
`addition_embed_type`), and a second text encoder does not either (the SDXL refiner has one).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sushi_research.errors import UserError

NAMES = {"sd15": "a Stable Diffusion 1.5", "sdxl": "an SDXL"}
SCRIPTS = {"sd15": "scripts/train_sd15_lora.py", "sdxl": "scripts/train_sdxl_lora.py"}


def read_config(folder: Path, component: str) -> dict[str, Any] | None:
    """The `config.json` of a component (`scheduler_config.json` of a scheduler), or None where the folder has none."""
    path = folder / component / ("scheduler_config.json" if component == "scheduler" else "config.json")
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): download the model again.") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} does not hold a model's config: download the model again.")
    return config


def identify(folder: Path) -> str:
    """`"sd15"` or `"sdxl"` for a base in diffusers format; UserError with the reason for anything else."""
    index_path = folder / "model_index.json"
    if not index_path.is_file():
        raise UserError(
            f"{folder} is not a model in diffusers format (it has no model_index.json): "
            "give model.base a folder made by save_pretrained, or a hub id."
        )
    try:
        pipeline = json.loads(index_path.read_text())["_class_name"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{index_path} is damaged (no _class_name): download the model again.") from None
    unet = read_config(folder, "unet")
    if unet is None:
        raise UserError(
            f"{folder} holds a {pipeline} without a UNet, and this suite trains the UNets of SD1.5 and SDXL: "
            "choose a base of those."
        )
    refusal = _refusal(folder, unet, pipeline)
    if refusal:
        raise UserError(f"{folder} is {refusal}, which this suite does not train: choose an SD1.5 or SDXL base.")
    architecture = "sdxl" if unet.get("addition_embed_type") == "text_time" else "sd15"
    _require_eps(folder)
    return architecture


def require(folder: Path, architecture: str) -> None:
    """Refuses a base of another architecture than the script's, in a sentence that says which script to use."""
    found = identify(folder)
    if found != architecture:
        raise UserError(f"{folder} is {NAMES[found]} base: train it with {SCRIPTS[found]}.")


def _refusal(folder: Path, unet: dict[str, Any], pipeline: str) -> str | None:
    """What the base is, when it is neither SD1.5 nor SDXL base."""
    channels = unet.get("in_channels", 4)
    if channels == 9:
        return "an inpainting model (9 input channels)"
    if channels == 8:
        return "an instruct-pix2pix model (8 input channels)"
    if channels != 4:
        return f"a {pipeline} whose UNet takes {channels} input channels"
    first, second = read_config(folder, "text_encoder"), read_config(folder, "text_encoder_2")
    width = unet.get("cross_attention_dim", 1280)
    addition = unet.get("addition_embed_type")
    if addition == "text_time":
        pooled_and_sizes = unet.get("projection_class_embeddings_input_dim")
        if second is None:
            return "an SDXL model without its second text encoder"
        sizes = pooled_and_sizes - second.get("projection_dim", 512) if pooled_and_sizes else 0
        if first is None or sizes == 5 * unet.get("addition_time_embed_dim", 256):
            return "the SDXL refiner"
        if sizes != 6 * unet.get("addition_time_embed_dim", 256) or width != first.get("hidden_size", 512) + second.get(
            "hidden_size", 512
        ):
            return "an SDXL-like model whose UNet and text encoders do not fit together"
        vae = read_config(folder, "vae") or {}
        if vae.get("latents_mean") is not None:
            return "Playground v2.5 or a model like it (its VAE has latents_mean)"
        return None
    if addition is not None or unet.get("class_embed_type") is not None:
        return f"a {pipeline} whose UNet has another conditioning ({addition or unet.get('class_embed_type')})"
    if unet.get("use_linear_projection"):
        return "Stable Diffusion 2.x (its UNet has linear projections)"
    if first is None:
        return "a Stable Diffusion model without its text encoder"
    if width != first.get("hidden_size", 512) or second is not None:
        return f"a {pipeline} whose UNet and text encoder do not fit together"
    return None


def _require_eps(folder: Path) -> None:
    scheduler = read_config(folder, "scheduler")
    if scheduler is None:
        raise UserError(
            f"{folder} has no scheduler/scheduler_config.json, and nothing else says what the model predicts: "
            "download the model again."
        )
    prediction = scheduler.get("prediction_type", "epsilon")
    if prediction != "epsilon":
        raise UserError(
            f"{folder} predicts {prediction} (scheduler_config.json), and this suite trains the noise prediction (epsilon) "
            "only: training it as epsilon would ruin it, so choose an epsilon base."
        )
