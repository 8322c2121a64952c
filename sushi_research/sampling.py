"""Pictures while training: from the UNet in memory and cached text, with the VAE loaded for the decoding only."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from PIL import Image

from sushi_research.models import loading
from sushi_research.progress import progress


def draw_latents(
    model: ModuleType,
    base: loading.Base,
    unet: Any,
    texts: Sequence[dict[str, torch.Tensor]],
    negative: dict[str, torch.Tensor],
    *,
    seeds: Sequence[int],
    steps: int,
    guidance: float,
    height: int,
    width: int,
) -> list[torch.Tensor]:
    """Latents [1, 4, H/8, W/8] for each text and seed, texts outermost, by diffusers' own pipeline (20 Euler steps, say).

    `texts` hold "hidden" [77, D] and, for SDXL, "pooled" [P]. The starting noise depends on the seed alone.
    """
    import diffusers

    scheduler = diffusers.EulerDiscreteScheduler.from_pretrained(base.folder / "scheduler")
    encoders = {name: None for text_encoder in model.TEXT_ENCODERS for name in (text_encoder, _tokenizer(text_encoder))}
    parts = {"unet": unet, "vae": None, "scheduler": scheduler, **encoders, **model.PIPELINE_WITHOUT}
    pipeline = getattr(diffusers, model.PIPELINE)(**parts)
    pipeline.set_progress_bar_config(disable=True)
    was_training = unet.training
    unet.eval()  # no adapter dropout in a picture
    latents = []
    try:
        work = [(text, seed) for text in texts for seed in seeds]
        for text, seed in progress(work, description="drawing samples", unit="picture", leave=False):
            arguments = _embeddings(text, "", unet) | _embeddings(negative, "negative_", unet)
            drawn = pipeline(
                **arguments,
                generator=torch.Generator("cpu").manual_seed(seed),
                num_inference_steps=steps,
                guidance_scale=guidance,
                height=height,
                width=width,
                output_type="latent",
            )
            latents.append(drawn.images)
    finally:
        unet.train(was_training)
    return latents


def _tokenizer(text_encoder: str) -> str:
    return text_encoder.replace("text_encoder", "tokenizer")


def _embeddings(text: dict[str, torch.Tensor], prefix: str, unet: Any) -> dict[str, torch.Tensor]:
    names = {"hidden": "prompt_embeds", "pooled": "pooled_prompt_embeds"}
    if prefix:
        names = {"hidden": "negative_prompt_embeds", "pooled": "negative_pooled_prompt_embeds"}
    return {names[name]: tensor[None].to(unet.device, unet.dtype) for name, tensor in text.items()}


def unconditional(text: dict[str, torch.Tensor], force_zeros: bool) -> dict[str, torch.Tensor]:
    """The negative embedding of an empty negative prompt: the encoded empty caption, or zeros where the base wants them.

    SDXL's model_index says `force_zeros_for_empty_prompt: true`, and diffusers' pipeline obeys it; so do we.
    """
    return {name: torch.zeros_like(tensor) for name, tensor in text.items()} if force_zeros else text


@torch.no_grad()
def decode(vae: Any, latents: Sequence[torch.Tensor], scaling_factor: float) -> list[Image.Image]:
    """The pictures of latents [1, 4, h, w], each decoded alone in the VAE's own dtype."""
    pictures = []
    for latent in latents:
        decoded = vae.decode(latent.to(vae.device, vae.dtype) / scaling_factor).sample[0].float()
        pixels = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
        pictures.append(Image.fromarray(pixels))
    return pictures
