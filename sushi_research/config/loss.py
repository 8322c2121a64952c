"""The config section of the loss: its type, its weights, and the noise."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sushi_research.config.section import Section

# Gamma where a weighting needs one and none is given: that of the paper on min-SNR.
GAMMA = 5.0


class LossSection(Section):
    """The loss of the prediction, in fp32, and the noise (docs/objectives.md)."""

    type: Literal["mse", "l1", "huber", "smooth_l1", "pseudo_huber"] = Field(
        "mse",
        description="mse = mean squared error; l1 = absolute error; huber, smooth_l1 and pseudo_huber = squared error up to about "
        "huber_c and absolute beyond (what kohya and diffusers call huber is pseudo_huber)",
    )
    huber_c: float = Field(
        0.1, ge=1e-6, le=1000, description="Where huber, smooth_l1 and pseudo_huber go from squared to absolute errors"
    )
    huber_schedule: Literal["constant", "exponential", "snr"] = Field(
        "snr",
        description="huber_c over the timesteps: constant; exponential or snr = near 1 where there is little noise, and falling to "
        "huber_c",
    )
    weighting: Literal["none", "min_snr", "soft_min_snr", "debiased", "p2", "v_like"] | None = Field(
        None,
        description="Weight of the loss at each timestep, by its signal-to-noise ratio; null = min_snr if snr_gamma is set, or "
        "else none",
    )
    snr_gamma: float | None = Field(
        None,
        ge=0.001,
        le=10_000,
        description="Gamma of min_snr and soft_min_snr weighting: the cap on the signal-to-noise ratio (5 in its paper); "
        "null = off, or 5 if weighting says one of these two",
    )
    p2_gamma: float = Field(1.0, ge=0, le=10, description="Exponent of p2 weighting (0.5 or 1 in its paper)")
    p2_k: float = Field(1.0, ge=0.001, le=1000, description="What p2 weighting adds to the signal-to-noise ratio")
    noise_offset: float = Field(
        0.0,
        ge=0,
        le=10,
        description="Strength of the constant offset that is added to the noise of each image and channel; 0 = off",
    )
    noise_offset_random: bool = Field(False, description="Each image has a random strength between 0 and noise_offset")
    multires_iterations: int = Field(
        0,
        ge=0,
        le=12,
        description="Multi-resolution noise: so many resolutions, each 2 to 4 times coarser, are added to the noise (6 to 10 are "
        "usual); 0 = off",
    )
    multires_discount: float = Field(
        0.3, gt=0, le=1, description="Strength of each resolution of multi-resolution noise over that of the finer one"
    )
    input_perturbation: float = Field(
        0.0,
        ge=0,
        le=10,
        description="Strength of noise that is added to the noisy latents and not to the target (0.1 in its paper); 0 = off",
    )


def weighting_of(weighting: str | None, snr_gamma: float | None) -> str:
    """The weighting that these two keys ask for, or none."""
    return weighting or ("none" if snr_gamma is None else "min_snr")


def gamma_of(snr_gamma: float | None) -> float:
    """Gamma of min_snr and soft_min_snr."""
    return GAMMA if snr_gamma is None else snr_gamma
