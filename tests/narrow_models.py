"""Models with every module of the published ones, a few channels wide: the real number of blocks and of text-encoder layers."""

from __future__ import annotations

import functools
from typing import Any

import torch

from testing.real_configs import NARROW_UNETS, SD15_TEXT, SDXL_TEXT_1, SDXL_TEXT_2, UNETS

# The widths of the text encoders together are the UNet's cross_attention_dim, as in the published models.
_TEXTS = {
    "sd15": {"text_encoder": (SD15_TEXT, 16)},
    "sdxl": {"text_encoder": (SDXL_TEXT_1, 12), "text_encoder_2": (SDXL_TEXT_2, 20)},
}


def components(architecture: str, *, real: bool = False, device: str = "meta") -> dict[str, Any]:
    """UNet and text encoders by the pipeline's names, narrow or (`real`) of the published widths, in evaluation mode."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(0)
        found = {"unet": UNet2DConditionModel.from_config((UNETS if real else NARROW_UNETS)[architecture])}
        for component, (config, width) in _TEXTS[architecture].items():
            narrow = {
                "hidden_size": width,
                "intermediate_size": 2 * width,
                "num_attention_heads": 2,
                "projection_dim": 16,
            }
            kind = CLIPTextModel if component == "text_encoder" else CLIPTextModelWithProjection
            found[component] = kind(CLIPTextConfig(**config if real else config | narrow | {"vocab_size": 514}))
    return {component: module.eval() for component, module in found.items()}


def layers(found: dict[str, Any]) -> dict[tuple[str, str], Any]:
    """(component, path without `text_model.`) -> every module with a weight, but for embeddings."""
    return {
        (component, path.removeprefix("text_model.")): module
        for component, model in found.items()
        for path, module in model.named_modules()
        if getattr(module, "weight", None) is not None and not isinstance(module, torch.nn.Embedding)
    }


@functools.cache
def weights(architecture: str, *, real: bool = False) -> dict[tuple[str, str], torch.Tensor]:
    """`layers` of the narrow model with random weights on the CPU, or of the published widths on the meta device."""
    device = "meta" if real else "cpu"
    return {
        layer: module.weight.detach()
        for layer, module in layers(components(architecture, real=real, device=device)).items()
    }
