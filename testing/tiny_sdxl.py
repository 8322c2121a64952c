"""A tiny SDXL base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from testing import tiny_base


def pipeline(folder: Path, sample_size: int) -> Any:
    """The pipeline with random weights; its tokenizers are written to `folder`."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    return StableDiffusionXLPipeline(
        vae=tiny_base.vae(sample_size, scaling_factor=0.13025),
        unet=UNet2DConditionModel(
            sample_size=sample_size,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(16, 32, 32),
            norm_num_groups=8,
            attention_head_dim=(2, 4, 4),
            transformer_layers_per_block=(1, 1, 2),
            use_linear_projection=True,
            cross_attention_dim=64,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=32 + 6 * 8,
        ),
        text_encoder=tiny_base.text_encoder(32, projection=None),
        text_encoder_2=tiny_base.text_encoder(32, projection=32),
        tokenizer=tiny_base.tokenizer(folder / "tokenizer", pad="<|endoftext|>"),
        tokenizer_2=tiny_base.tokenizer(folder / "tokenizer_2", pad="!"),
        # The sampling scheduler of the SDXL repository.
        scheduler=EulerDiscreteScheduler(**tiny_base.SCHEDULE, timestep_spacing="leading", steps_offset=1),
        force_zeros_for_empty_prompt=True,
    )
