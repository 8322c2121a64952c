"""How far a generated picture is from another one, by their latents."""

from __future__ import annotations

import torch

from sushi_research import objectives

# Increment it when the distance changes. Results of different schemes are not compared.
SCHEME = 1


def distance(picture: torch.Tensor, reference: torch.Tensor) -> float:
    """The mean squared difference of two pictures' scaled latents, [4, h, w] each, in float32; 0 for equal latents.

    NaN or infinite if a latent is.
    """
    assert picture.shape == reference.shape, (picture.shape, reference.shape)
    return objectives.mse_per_sample(picture[None], reference[None]).item()
