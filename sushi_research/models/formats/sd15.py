"""Stable Diffusion 1.5: how it is recognised and stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sushi_research.models.formats import CLIP_L, PLACES, SCHEDULER, FileUNet, Match, Place, number

TEXT_ENCODERS = ("text_encoder",)

SINGLE_FILE: dict[str, Place] = {
    **PLACES,
    "text_encoder": (
        ("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer."),
        "embeddings.token_embedding.weight",
    ),
}

# Config values that no tensor shape shows, from the configs of stable-diffusion-v1-5/stable-diffusion-v1-5. models/shapes.py
# adds the widths, depths and vocabulary size that it reads from a single file's header.
PUBLISHED: dict[str, Any] = {
    "unet": {
        "act_fn": "silu",
        "attention_head_dim": 8,  # in diffusers' old meaning: eight heads at every width
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        "in_channels": 4,
        "out_channels": 4,
        "sample_size": 64,
    },
    "vae": {"sample_size": 512, "scaling_factor": 0.18215},
    "text_encoder": {"hidden_act": "quick_gelu"},
    "scheduler": SCHEDULER,  # the repository's is PNDM; only the noise schedule and the spacing are used
    "pad_tokens": {"text_encoder": "<|endoftext|>"},
    "force_zeros_for_empty_prompt": False,
    # Repositories whose tokenizer is used if it is in the hub's cache.
    "repositories": ["stable-diffusion-v1-5/stable-diffusion-v1-5", "runwayml/stable-diffusion-v1-5"],
}

# The sizes of the published components, which of a base are read from its tensors or its configs. Adapter files are recognised by
# them where there is no base.
SIZES: dict[str, dict[str, Any]] = {
    "unet": {"block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 768, "layers_per_block": 2},
    "text_encoder": CLIP_L,
}

# Adapter files. A1111 and others identify the base by the first two. kohya's trainers write them, by prediction type.
BASE_VERSION = {"epsilon": "sd_v1", "v_prediction": "sd_v1_v", "rectified_flow": "sd_v1"}
MODELSPEC_ARCHITECTURE = "stable-diffusion-v1/lora"
MODELSPEC_IMPLEMENTATION = "diffusers"
# Modules are named after diffusers' blocks, not Stability's.
STABILITY_NAMES = False
# The diffusers class whose pipelines load the file.
ADAPTER_LOADER = "StableDiffusionLoraLoaderMixin"


def of_file(unet: FileUNet) -> Match:
    """Whether a single file holds an SD1.5 UNet."""
    if unet.added is not None:
        return False
    if unet.linear or unet.open_clip or unet.context == 1024:
        return "Stable Diffusion 2.x (another text encoder)"
    return True


def of_configs(unet: Mapping[str, Any], configs: Mapping[str, Mapping[str, Any] | None]) -> Match:
    """Whether the configs of a folder are those of an SD1.5 base."""
    if unet.get("addition_embed_type") is not None or unet.get("class_embed_type") is not None:
        return False
    if unet.get("use_linear_projection"):
        return "Stable Diffusion 2.x (its UNet has linear projections)"
    if number(unet, "cross_attention_dim", 1280) == 1024:
        return "Stable Diffusion 2.x (another text encoder)"
    return True
