"""The demo's painter: diffusers alone loads the adapter, and what it loads otherwise than the file says is refused."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from demo.painter import load_pipeline
from sushi_research.adapters.lora import ADAPTER, adapter_modules
from sushi_research.errors import UserError

NAMES = [f"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_{layer}" for layer in "qkv"]


def test_an_adapter_is_painted_with_as_its_file_says_or_not_at_all(bases, tmp_path) -> None:
    path = tmp_path / "adapter.safetensors"
    alphas = {f"{name}.alpha": torch.tensor(1.0) for name in NAMES}
    tensors = {f"{name}.lora_down.weight": torch.ones(2, 32) for name in NAMES} | alphas
    tensors |= {f"{name}.lora_up.weight": torch.ones(32, 2) for name in NAMES}
    save_file(tensors, path)
    layers = adapter_modules(load_pipeline(bases["sd15"], path).unet)
    assert [layer.scaling[ADAPTER] for layer in layers.values()] == [0.5] * 3

    # Without an alpha the scale is 1, but diffusers takes the others' alpha.
    last = f"{NAMES[-1]}.alpha"
    save_file({key: value for key, value in tensors.items() if key != last}, path)
    with pytest.raises(UserError, match="alpha / rank = 2 / 2 in .*to_v, and diffusers loads it with the scale 0.5"):
        load_pipeline(bases["sd15"], path)
    save_file(tensors | {last: torch.tensor(float("nan"))}, path)
    with pytest.raises(UserError, match="holds NaN"):
        load_pipeline(bases["sd15"], path)
