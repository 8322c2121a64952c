"""What the network sees of training images: their crops after the VAE, and how far those are from the crops."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from sushi_research.caches.encoding import encode_images
from sushi_research.data import images
from sushi_research.reports.data_page.uses import Use
from sushi_research.sampling.vae_tiles import decode_latents

# The difference of two pictures is shown so many times larger.
ENLARGED = 8


@dataclass(frozen=True)
class DecodedImage:
    """The crop of an image as the VAE gets it, and the image that the VAE makes of the latents; uint8 [H, W, 3] each."""

    use: Use
    crop: np.ndarray
    decoded: np.ndarray

    @property
    def mean_error(self) -> float:
        """The mean absolute difference, of 255."""
        return float(np.abs(self._difference).mean())

    @property
    def psnr(self) -> float:
        """The peak signal-to-noise ratio in dB; infinite if both are equal."""
        mean_square = float(np.square(self._difference).mean())
        return 10 * math.log10(255**2 / mean_square) if mean_square else math.inf

    @property
    def difference(self) -> Image.Image:
        """The absolute difference times ENLARGED."""
        return Image.fromarray(np.clip(ENLARGED * np.abs(self._difference), 0, 255).astype(np.uint8))

    @property
    def _difference(self) -> np.ndarray:
        return self.decoded.astype(np.float32) - self.crop


@torch.no_grad()
def decode_uses(uses: Iterable[Use], vae: Any) -> Iterator[DecodedImage]:
    """Encodes and decodes each, one at a time. The latents are the mean of the VAE's distribution in fp16, as the cache has it."""
    for use in uses:
        crop = images.resize_and_crop(images.decode(use.sample.read()), use.geometry, flip=False)
        [mean], _ = encode_images(vae, crop[None])
        decoded = decode_latents(vae, mean[None].to(vae.device, vae.dtype))[0].float()
        pixels = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        yield DecodedImage(use, crop, pixels.permute(1, 2, 0).cpu().numpy())
