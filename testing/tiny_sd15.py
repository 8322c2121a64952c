"""A tiny SD1.5 base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from testing import tiny_base


def pipeline(folder: Path, sample_size: int) -> Any:
    """The pipeline with random weights; its tokenizer is written to `folder`."""
    from diffusers import PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    return StableDiffusionPipeline(
        vae=tiny_base.vae(sample_size, scaling_factor=0.18215),
        unet=UNet2DConditionModel(
            sample_size=sample_size,
            block_out_channels=(16, 32, 32, 32),
            norm_num_groups=8,
            attention_head_dim=4,
            cross_attention_dim=32,
        ),
        text_encoder=tiny_base.text_encoder(32, projection=None),
        tokenizer=tiny_base.tokenizer(folder / "tokenizer", pad="<|endoftext|>"),
        # The sampling scheduler of the SD1.5 repository.
        scheduler=PNDMScheduler(**tiny_base.SCHEDULE, skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
