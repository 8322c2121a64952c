"""New tokens in adapter files of other trainers, and files that are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sushi_research.adapters.reading import adapts_text, is_adapter, read_adapter
from sushi_research.errors import UserError

LORA = {
    "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.ones(1, 32, 1, 1),
    "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": torch.ones(32, 1, 1, 1),
}
L, G = torch.ones(2, 768), torch.zeros(2, 1280)


def saved(folder: Path, **tokens: torch.Tensor) -> Path:
    path = folder / "given.safetensors"
    save_file(LORA | {f"bundle_emb.{key}": tensor.clone() for key, tensor in tokens.items()}, path)
    return path


@pytest.mark.parametrize("key", ["string_to_param.*", "emb_params", "clip_l"])
def test_sd15(key: str, tmp_path: Path) -> None:
    """As A1111 defines them, and as OneTrainer writes them."""
    path = saved(tmp_path, **{f"my.cat.{key}": L})
    adapter = read_adapter(path)
    assert torch.equal(adapter.tokens["my.cat"]["text_encoder"], L) and len(adapter.entries) == 1
    assert adapts_text(path) and is_adapter(path)


def test_sdxl(tmp_path: Path) -> None:
    path = saved(tmp_path, **{"<a>.clip_l": L, "<a>.clip_g": G})
    assert read_adapter(path).tokens["<a>"].keys() == {"text_encoder", "text_encoder_2"}


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ({"a.clip_l": L, "a.clip_g": G[:1]}, "shapes \\[1, 1280\\], \\[2, 768\\]"),
        ({"a.clip_l": L[:0]}, "shapes \\[0, 768\\]"),
        ({"a.clip_l": L[0]}, "shapes \\[768\\]"),
        ({"a.clip_g": G}, "different text encoders"),
        ({"a.clip_l": L, "b.clip_l": L, "b.clip_g": G}, "different text encoders"),
        ({"a.clip_l": L, "a.emb_params": L}, "twice, in two spellings"),
        ({"a.clip_l": L, "A.clip_l": L}, "twice, in upper and lower case"),
        ({"a b.clip_l": L}, "with the name 'a b'"),
        ({"a.clip_l": L.long()}, "no floating-point numbers"),
        ({"a.clip_l": L / 0}, "holds infinity"),
        ({"a.clip_l": torch.ones(1001, 1)}, "1,001 vectors, and at most 1,000"),
        ({"a.clip_l_out": L}, "holds a textual inversion embedding"),
    ],
)
def test_refusals(tokens: dict[str, torch.Tensor], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        read_adapter(saved(tmp_path, **tokens))


def test_new_tokens_alone_are_no_adapter(tmp_path: Path) -> None:
    save_file({"bundle_emb.a.clip_l": L}, tmp_path / "given.safetensors")
    with pytest.raises(UserError, match="holds a textual inversion embedding"):
        read_adapter(tmp_path / "given.safetensors")
