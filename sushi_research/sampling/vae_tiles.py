"""Decodes latents with the VAE: whole where the device has the memory for it, otherwise in tiles, as diffusers does.

A tile is decoded without the rest of the image, so colours and details near its edges may differ slightly from a whole image;
neighbouring tiles overlap by a quarter and are blended. diffusers takes the size of a tile from `sample_size` of the VAE's config,
which is 1024 for SDXL: an image of 1024 pixels would be one tile. So the size is set here.
"""

from __future__ import annotations

import functools
import gc
import logging
from typing import Any

import torch

logger = logging.getLogger(__name__)

# Sides of the tiles in pixels, tried in this order. A quarter of the pixels take about a quarter of the memory.
TILES = (512, 256)
# Pixels of a side that a latent pixel stands for.
_FACTOR = 8


def decode_latents(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """The decoded image [1, 3, 8h, 8w] of unscaled latents [1, 4, h, w], in the VAE's dtype.

    If the device runs out of memory, this image and all later ones of this `vae` are decoded in tiles, and a warning says so once.
    Raises torch.OutOfMemoryError if tiles of 256 pixels do not fit either.
    """
    side = vae.tile_sample_min_size if vae.use_tiling else None
    for tile in (side, *(tile for tile in TILES if side is None or tile < side)):
        if tile is not None:
            vae.enable_tiling()
            vae.tile_sample_min_size, vae.tile_latent_min_size = tile, tile // _FACTOR
        try:
            return vae.decode(latents).sample
        except torch.OutOfMemoryError:
            if tile == TILES[-1]:
                raise
        # Outside of the handler, which keeps the tensors of the failed call.
        _free()
        _report()
    raise AssertionError("the smallest tile returns or raises")


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@functools.cache
def _report() -> None:
    """Says once per process that images are decoded in tiles."""
    logger.warning(
        "the device has too little memory to decode an image whole: the VAE decodes it in tiles of %d pixels or less, whose edges "
        "may show slightly",
        TILES[0],
    )
