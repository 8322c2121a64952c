"""SDXL base: how it is recognised and stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sushi_research.models.formats import CLIP_L, PLACES, SCHEDULER, FileUNet, Match, Place, number

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")

SINGLE_FILE: dict[str, Place] = {
    **PLACES,
    "text_encoder": (
        ("conditioner.embedders.0.transformer.text_model.", "conditioner.embedders.0.transformer."),
        "embeddings.token_embedding.weight",
    ),
    "text_encoder_2": (("conditioner.embedders.1.model.",), "token_embedding.weight"),
}

# Config values that no tensor shape shows, from the configs of stabilityai/stable-diffusion-xl-base-1.0. models/shapes.py adds
# the widths, depths and vocabulary size that it reads from a single file's header.
PUBLISHED: dict[str, Any] = {
    "unet": {
        "act_fn": "silu",
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "head_width": 64,  # the number of heads grows with the width: 5, 10, 20
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "use_linear_projection": True,
        "in_channels": 4,
        "out_channels": 4,
        "sample_size": 128,
    },
    "vae": {
        "force_upcast": True,  # SDXL's original VAE overflows in fp16, and a single file does not say which VAE it holds
        "sample_size": 1024,
        "scaling_factor": 0.13025,
    },
    "text_encoder": {"hidden_act": "quick_gelu"},
    "text_encoder_2": {"hidden_act": "gelu"},
    "scheduler": SCHEDULER,
    "pad_tokens": {"text_encoder": "<|endoftext|>", "text_encoder_2": "!"},
    "force_zeros_for_empty_prompt": True,
    # Repositories whose tokenizer is used if it is in the hub's cache.
    "repositories": ["stabilityai/stable-diffusion-xl-base-1.0"],
}

# The sizes of the published components, as in sd15.py.
SIZES: dict[str, dict[str, Any]] = {
    "unet": {
        "attention_head_dim": [5, 10, 20],
        "block_out_channels": [320, 640, 1280],
        "cross_attention_dim": 2048,
        "layers_per_block": 2,
        "projection_class_embeddings_input_dim": 2816,
        "transformer_layers_per_block": [1, 2, 10],
    },
    "text_encoder": CLIP_L,
    "text_encoder_2": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_attention_heads": 20,
        "num_hidden_layers": 32,
        "projection_dim": 1280,
    },
}

# Adapter files. A1111 and others identify the base by the first two. kohya's trainers have one name for all prediction types.
BASE_VERSION = {"epsilon": "sdxl_base_v1-0", "v_prediction": "sdxl_base_v1-0", "rectified_flow": "sdxl_base_v1-0"}
MODELSPEC_ARCHITECTURE = "stable-diffusion-xl-v1-base/lora"
MODELSPEC_IMPLEMENTATION = "https://github.com/Stability-AI/generative-models"
# Modules are named after the blocks of Stability's code (`input_blocks.4.1`).
STABILITY_NAMES = True
# The diffusers class whose pipelines load the file.
ADAPTER_LOADER = "StableDiffusionXLLoraLoaderMixin"


def of_file(unet: FileUNet) -> Match:
    """Whether a single file holds an SDXL base UNet."""
    if unet.added is None:
        return False
    if unet.open_clip or unet.context == 1024:
        return "Stable Diffusion 2.1 unCLIP"
    return "the SDXL refiner" if unet.added == 2560 else True


def of_configs(unet: Mapping[str, Any], configs: Mapping[str, Mapping[str, Any] | None]) -> Match:
    """Whether the configs of a folder are those of an SDXL base."""
    if unet.get("addition_embed_type") != "text_time":
        return False
    first, second = configs.get("text_encoder"), configs.get("text_encoder_2")
    pooled = number(second, "projection_dim", 512) if second else 1280
    added = number(unet, "projection_class_embeddings_input_dim", 0)
    five_sizes = added - pooled == 5 * number(unet, "addition_time_embed_dim", 256)
    if five_sizes or (second and not first and added == 2560):
        return "the SDXL refiner"
    if (configs.get("vae") or {}).get("latents_mean") is not None:
        return "Playground v2.5 or a model like it (its VAE has latents_mean)"
    return True
