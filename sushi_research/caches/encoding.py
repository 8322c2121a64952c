"""Fills the caches: images to VAE posteriors, captions to text embeddings. Only missing entries are computed.

Images and captions are encoded one at a time: with a batch of four the VAE changes the last bits of 0.4 % of the fp16 values,
and an entry must not depend on which others were missing with it. Entries are stored in fp16, which changes the adapter's gradient
by 4.7e-5 to 1.3e-3 of its size (measured). The VAE computes in fp32 unless
its config declares it safe in fp16 (`loading.vae_dtype`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch

from sushi_research.caches.keys import entry_key
from sushi_research.caches.store import Store
from sushi_research.data import images
from sushi_research.data.samples import Item
from sushi_research.errors import UserError
from sushi_research.progress import progress

LATENT_TENSORS = ("mean", "std")
# Increase this if decoding, resizing or the stored content changes. It is part of every key, so old entries are not read.
RECIPE = 1


def latent_key(item: Item, flip: bool, vae_hash: str, dtype: torch.dtype) -> str:
    """The key of an image's posterior: image bytes, VAE weights and dtype, and everything that determines the VAE's input.

    The colour recipe is part of it only if the image is converted, so that the entries of other images remain valid.
    """
    geometry = item.geometry
    return entry_key(
        recipe=RECIPE,
        image=item.sample.image_hash,
        vae=vae_hash,
        dtype=str(dtype),
        resized=[geometry.resized_height, geometry.resized_width],
        crop=[geometry.crop_top, geometry.crop_left],
        size=[geometry.height, geometry.width],
        flip=flip,
        **item.sample.colour_recipe,
    )


def text_key(caption: str, encoder_hashes: Sequence[str], settings: dict[str, Any]) -> str:
    """The key of a caption's embedding: its text, the hashes of encoders and tokenizers, and settings such as the layer."""
    return entry_key(recipe=RECIPE, caption=caption, encoders=list(encoder_hashes), settings=settings)


def prompt_key(prompt: str, encoder_hashes: Sequence[str], settings: dict[str, Any]) -> str:
    """The key of a long prompt's embedding, which is not that of the caption with the same text, because captions are cut."""
    return entry_key(recipe=RECIPE, chunked=prompt, encoders=list(encoder_hashes), settings=settings)


def missing_latents(
    store: Store, items: Iterable[Item], flips: Sequence[bool], vae_hash: str, dtype: torch.dtype
) -> list[tuple[str, Item, bool]]:
    """(key, item, flip) of every posterior that the store lacks, each key once, sorted by key."""
    wanted: dict[str, tuple[str, Item, bool]] = {}
    for item in items:
        for flip in flips:
            key = latent_key(item, flip, vae_hash, dtype)
            if key not in store:
                wanted.setdefault(key, (key, item, flip))
    return [wanted[key] for key in sorted(wanted)]


def encode_latents(
    store: Store, missing: Sequence[tuple[str, Item, bool]], vae: Any, *, rank: int = 0, world: int = 1
) -> None:
    """Encodes this process's share of `missing` and adds it to the store. Raises UserError if a posterior is not finite."""
    mine = [entry for entry in missing if _owner(entry[0], world) == rank]
    bar = progress(mine, description="encoding images", unit="image", disable=rank > 0)
    with store.writer() as writer:
        for key, item, flip in bar:
            pixels = images.resize_and_crop(images.decode(item.sample.read()), item.geometry, flip)
            mean, std = encode_image(vae, pixels)
            if not (mean.isfinite().all() and std.isfinite().all()):
                raise UserError(
                    f"the VAE gives values that are not finite for {item.sample.name}: SDXL's original VAE does so in fp16, "
                    "so use a VAE whose config does not wrongly say force_upcast: false, or remove the image."
                )
            metadata = {"image": item.sample.image_hash, "size": list(item.bucket), "flip": flip}
            writer.add(key, {"mean": mean, "std": std}, metadata)


def _owner(key: str, world: int) -> int:
    """The process that computes an entry. It depends only on the key, so a concurrent run does not change the assignment."""
    return int(key, 16) % world


@torch.no_grad()
def encode_image(vae: Any, pixels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, std) of the VAE's posterior, each [4, H/8, W/8] float16 on the CPU, of one image [H, W, 3] uint8.

    Unscaled, as in `AutoencoderKL.encode(...).latent_dist`: the scaling factor is applied after sampling.
    """
    image = torch.tensor(pixels).to(vae.device).permute(2, 0, 1)[None].to(vae.dtype) / 127.5 - 1.0
    posterior = vae.encode(image).latent_dist
    return posterior.mean[0].half().cpu(), posterior.std[0].half().cpu()


def missing_captions(
    store: Store, captions: Iterable[str], encoder_hashes: Sequence[str], settings: dict[str, Any]
) -> list[tuple[str, str]]:
    """(key, caption) of every distinct caption that the store lacks."""
    wanted = {text_key(caption, encoder_hashes, settings): caption for caption in captions}
    return sorted((key, caption) for key, caption in wanted.items() if key not in store)


def encode_captions(
    store: Store,
    missing: Sequence[tuple[str, str]],
    encode_caption: Callable[[str], tuple[dict[str, torch.Tensor], int]],
    *,
    rank: int = 0,
    world: int = 1,
    what: str = "caption",
) -> None:
    """Encodes this process's share of `missing` and adds it in fp16. Raises UserError if an embedding is not finite.

    `encode_caption` returns the tensors by name and the number of tokens that were cut. `what` is what the texts are called.
    """
    mine = [entry for entry in missing if _owner(entry[0], world) == rank]
    if not mine:
        return
    with store.writer() as writer:
        for key, caption in progress(mine, description=f"encoding {what}s", unit=what, disable=rank > 0):
            tensors, cut = encode_caption(caption)
            halves = {name: tensor.half().cpu() for name, tensor in tensors.items()}
            if not all(tensor.isfinite().all() for tensor in halves.values()):
                raise UserError(
                    f"the text encoder gives values that are not finite for the {what} {caption!r}: check its files."
                )
            writer.add(key, halves, {"caption": caption, "tokens_cut": cut})
