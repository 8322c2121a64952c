"""Tiny SD1.5 and SDXL bases with random weights: every block, attention and encoder of the real ones, a few channels wide.

They let the whole path run anywhere in seconds, without a download: the demo and the tests are made of them. What differs
from the real models: widths, the number of layers, transformer blocks per attention, and a tokenizer that knows bytes only.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

CONTEXT = {"sd15": 32, "sdxl": 64}


def save_tiny_base(folder: Path, architecture: str, *, seed: int = 0, sample_size: int = 8) -> Path:
    """Builds a tiny base of `architecture` ("sd15" or "sdxl") and writes it in diffusers format; returns the folder."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = _build(architecture, sample_size, folder)
        pipeline.save_pretrained(folder)
    return folder


def _build(architecture: str, sample_size: int, folder: Path) -> Any:
    from diffusers import (
        AutoencoderKL,
        EulerDiscreteScheduler,
        PNDMScheduler,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
    )

    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        layers_per_block=1,
        scaling_factor=0.18215 if architecture == "sd15" else 0.13025,
        sample_size=sample_size * 8,
    )
    if architecture == "sd15":
        return StableDiffusionPipeline(
            vae=vae,
            unet=_unet_sd15(sample_size),
            text_encoder=_text_encoder(32, projection=None),
            tokenizer=_tokenizer(folder / "tokenizer", pad="<|endoftext|>"),
            # The sampling scheduler of the SD1.5 repository.
            scheduler=PNDMScheduler(**schedule, skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    return StableDiffusionXLPipeline(
        vae=vae,
        unet=_unet_sdxl(sample_size),
        text_encoder=_text_encoder(32, projection=None),
        text_encoder_2=_text_encoder(32, projection=32),
        tokenizer=_tokenizer(folder / "tokenizer", pad="<|endoftext|>"),
        tokenizer_2=_tokenizer(folder / "tokenizer_2", pad="!"),
        # The sampling scheduler of the SDXL repository.
        scheduler=EulerDiscreteScheduler(**schedule, timestep_spacing="leading", steps_offset=1),
        force_zeros_for_empty_prompt=True,
    )


def _unet_sd15(sample_size: int) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=sample_size,
        block_out_channels=(16, 32, 32, 32),
        norm_num_groups=8,
        attention_head_dim=4,
        cross_attention_dim=CONTEXT["sd15"],
    )


def _unet_sdxl(sample_size: int) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=sample_size,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(16, 32, 32),
        norm_num_groups=8,
        attention_head_dim=(2, 4, 4),
        transformer_layers_per_block=(1, 1, 2),
        use_linear_projection=True,
        cross_attention_dim=CONTEXT["sdxl"],
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=32 + 6 * 8,
    )


def _text_encoder(width: int, projection: int | None) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=514,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=4,
        projection_dim=projection or width,
        # The second encoder's activation differs in the real model too.
        hidden_act="quick_gelu" if projection is None else "gelu",
        # The published configs carry 2 here, which makes transformers pool at the largest id: the end token.
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
    )
    return (CLIPTextModel if projection is None else CLIPTextModelWithProjection)(config)


def _tokenizer(folder: Path, pad: str) -> Any:
    """A CLIPTokenizer over single bytes (no merges): any caption tokenises, one token per byte."""
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    characters = list(bytes_to_unicode().values())
    words = characters + [character + "</w>" for character in characters] + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, pad_token=pad, model_max_length=77)


def main(arguments: list[str]) -> None:
    """`python -m testing.tiny_base ARCHITECTURE FOLDER`: makes a base there unless it is there already."""
    from sushi_research.training.run import quiet_libraries

    architecture, folder = arguments
    quiet_libraries()
    if not (Path(folder) / "model_index.json").is_file():
        print(f"making a tiny {architecture} base with random weights in {folder}")
        save_tiny_base(Path(folder), architecture, sample_size=16)


if __name__ == "__main__":
    main(sys.argv[1:])
