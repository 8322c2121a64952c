"""The demo's painter: an adapter file is painted with as it says, also where diffusers' own reader takes another scale."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from demo.painter import load_pipeline
from sushi_research.errors import UserError

NAMES = [f"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_{layer}" for layer in "qkv"]


def test_an_adapter_is_painted_with_as_its_file_says_or_not_at_all(bases, tmp_path) -> None:
    path = tmp_path / "adapter.safetensors"
    tensors = {f"{name}.lora_down.weight": torch.ones(2, 32) for name in NAMES}
    tensors |= {f"{name}.lora_up.weight": torch.ones(32, 2) for name in NAMES}
    # Without an alpha the scale is 1, but diffusers takes the others' alpha.
    save_file(tensors | {f"{name}.alpha": torch.tensor(1.0) for name in NAMES[:2]}, path)
    base, changed = (load_pipeline(bases["sd15"], adapter).unet for adapter in (None, path))
    x = torch.ones(1, 32)
    for layer, scale in (("to_q", 0.5), ("to_k", 0.5), ("to_v", 1.0)):
        plain, other = (
            unet.get_submodule(f"mid_block.attentions.0.transformer_blocks.0.attn1.{layer}")(x)
            for unet in (base, changed)
        )
        torch.testing.assert_close(other - plain, torch.full((1, 32), 64 * scale))

    save_file(tensors | {f"{NAMES[0]}.alpha": torch.tensor(float("nan"))}, path)
    with pytest.raises(UserError, match="holds NaN"):
        load_pipeline(bases["sd15"], path)
