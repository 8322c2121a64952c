"""Pictures while training: from the UNet in memory and cached text, with the VAE loaded for the decoding only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from sushi_research.models import loading
from sushi_research.models.prediction import Prediction
from sushi_research.progress import progress

if TYPE_CHECKING:
    from diffusers import EulerDiscreteScheduler


def sampling_scheduler(config: Mapping[str, Any], prediction: Prediction) -> EulerDiscreteScheduler:
    """The Euler scheduler for a base that predicts `prediction`; `config` is its scheduler config, whichever class wrote it.

    A zero-terminal base starts from the last timestep, as it was trained to (spacing "trailing": arXiv 2305.08891, section
    3.3), where diffusers takes 2^-24 for abar = 0 (sigma = 4096). Any other keeps the spacing of its config.
    """
    import diffusers

    # A base that predicts the noise learns nothing where there is only noise; it is refused when it is read.
    assert prediction != Prediction("epsilon", zero_terminal_snr=True)
    settings: dict[str, Any] = {
        "prediction_type": prediction.type,
        "rescale_betas_zero_snr": prediction.zero_terminal_snr,
    }
    if prediction.zero_terminal_snr:
        settings["timestep_spacing"] = "trailing"
    return diffusers.EulerDiscreteScheduler.from_config(dict(config), **settings)


def generate_latents(
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

    scheduler = sampling_scheduler(base.scheduler, base.prediction)
    encoders = {name: None for text_encoder in model.TEXT_ENCODERS for name in (text_encoder, _tokenizer(text_encoder))}
    parts = {"unet": unet, "vae": None, "scheduler": scheduler, **encoders, **model.PIPELINE_WITHOUT}
    pipeline = getattr(diffusers, model.PIPELINE)(**parts)
    pipeline.set_progress_bar_config(disable=True)
    was_training = unet.training
    unet.eval()  # no adapter dropout in a picture
    latents = []
    try:
        work = [(text, seed) for text in texts for seed in seeds]
        for text, seed in progress(work, description="generating images", unit="picture", leave=False):
            arguments = embeddings(text, negative, unet)
            generated = pipeline(
                **arguments,
                generator=torch.Generator("cpu").manual_seed(seed),
                num_inference_steps=steps,
                guidance_scale=guidance,
                height=height,
                width=width,
                output_type="latent",
            )
            latents.append(generated.images)
    finally:
        unet.train(was_training)
    return latents


def _tokenizer(text_encoder: str) -> str:
    return text_encoder.replace("text_encoder", "tokenizer")


def embeddings(text: dict[str, torch.Tensor], negative: dict[str, torch.Tensor], unet: Any) -> dict[str, torch.Tensor]:
    """The arguments of a pipeline's call for one encoded prompt and negative prompt; both as `generate_latents` has them."""
    names = {"hidden": "prompt_embeds", "pooled": "pooled_prompt_embeds"}
    negatives = {"hidden": "negative_prompt_embeds", "pooled": "negative_pooled_prompt_embeds"}
    given = {names[name]: tensor for name, tensor in text.items()}
    given |= {negatives[name]: tensor for name, tensor in negative.items()}
    return {name: tensor[None].to(unet.device, unet.dtype) for name, tensor in given.items()}


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
