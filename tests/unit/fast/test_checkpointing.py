"""Recomputed activations are those that were not stored: gradients are equal bit for bit in every mode."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from sushi_research import models
from sushi_research.adapters import lora
from sushi_research.adapters.settings import AdapterSettings
from sushi_research.fast import checkpointing
from sushi_research.models import loading


def gradients(architecture: str, folder: Any, mode: str, dropout: float) -> tuple[list[torch.Tensor], list[Any]]:
    """(the adapter's gradients of one sample, the modules that the backward pass ran again)."""
    model, again, backward = models.load(architecture), [], []
    unet = loading.load_unet(loading.resolve_base(str(folder)), torch.float32, torch.device("cpu"))
    options = {"targets": "attention_ff", "rank": 2, "alpha": 2.0, "init": "default", "seed": 0}
    lora.attach(unet, AdapterSettings(dropout=dropout, **options))
    unet.train()
    checkpointing.enable(unet, mode, draws=dropout > 0)
    parameters = lora.adapter_parameters({"unet": unet})
    generator = torch.Generator().manual_seed(1)
    for name, parameter in parameters.items():
        if name.endswith("lora_B.weight"):
            parameter.data.normal_(std=0.1, generator=generator)
    kinds = ("FeedForward", "ResnetBlock2D", "BasicTransformerBlock")
    for module in unet.modules():
        if type(module).__name__ in kinds:
            module.register_forward_pre_hook(lambda each, _: again.append(type(each).__name__) if backward else None)
            if type(module).__name__ == "FeedForward":  # its forward is what is recomputed, without its hooks
                module.net[0].register_forward_pre_hook(
                    lambda *_: again.append("feed-forward layer") if backward else None
                )
    draw = partial(torch.randn, generator=generator)
    text = {"hidden": draw(1, 77, unet.config.cross_attention_dim)}
    if unet.config.addition_embed_type:
        width = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
        text["pooled"] = draw(1, width)
    torch.manual_seed(2)
    time_ids = torch.tensor([[64.0, 64, 0, 0, 64, 64]])
    found = model.predict(unet, draw(1, 4, 8, 8), torch.tensor([500]), text, time_ids, dtype=torch.float32)
    backward.append(True)
    found.square().mean().backward()
    return [parameter.grad for parameter in parameters.values()], again


@pytest.mark.parametrize(("architecture", "dropout"), [("sd15", 0.0), ("sdxl", 0.5)])
def test_gradients_are_the_same_in_every_mode(architecture, base_folder, dropout):
    plain, again = gradients(architecture, base_folder, "none", dropout)
    assert not again
    for mode, runs_again in (("feed_forward", "feed-forward layer"), ("all", "ResnetBlock2D")):
        found, again = gradients(architecture, base_folder, mode, dropout)
        assert all(map(torch.equal, found, plain)), mode
        assert runs_again in again and ("ResnetBlock2D" in again) == (mode == "all")


def test_without_gradients_nothing_is_recomputed(base_folder, monkeypatch):
    monkeypatch.setattr(checkpointing, "checkpoint", None)
    unet = loading.load_unet(loading.resolve_base(str(base_folder)), torch.float32, torch.device("cpu"))
    checkpointing.enable(unet, "feed_forward", draws=False)
    block = next(each for each in unet.modules() if type(each).__name__ == "BasicTransformerBlock")
    with torch.no_grad():
        assert block.ff(torch.ones(1, 2, block.norm1.normalized_shape[0])).isfinite().all()
