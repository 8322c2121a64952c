"""What an adapter file's metadata says about the loss, the noise and the timesteps of its training."""

from __future__ import annotations

import json
from typing import Any

from sushi_research.config import TrainingConfig
from sushi_research.config.loss import gamma_of, weighting_of

# What sd-scripts calls them. Its smooth_l1 is none of ours.
_TYPES = {"l1": "l1", "pseudo_huber": "huber"}


def loss_entries(config: TrainingConfig, prediction_type: str) -> dict[str, Any]:
    """sd-scripts' keys where there is one of the same meaning, and `sushi_research.objective`; None for what is not used."""
    loss = config.loss
    multires, kind = loss.multires_iterations or None, _TYPES.get(loss.type)
    weighting = weighting_of(loss.weighting, loss.snr_gamma)
    # What had its key before is left out; gamma has one with min-SNR alone.
    known = {"noise_offset"} if weighting == "soft_min_snr" else {"noise_offset", "snr_gamma"}
    changed = config.model_dump(include={"loss", "timesteps"}, exclude={"loss": known}, exclude_defaults=True)
    changed = {section: values for section, values in changed.items() if values}
    return {
        "ss_min_snr_gamma": gamma_of(loss.snr_gamma) if weighting == "min_snr" else None,
        # Of v, sd-scripts' debiased estimation has other weights (docs/objectives.md).
        "ss_debiased_estimation": (weighting == "debiased" and prediction_type == "epsilon") or None,
        "ss_noise_offset": loss.noise_offset or None,
        "ss_noise_offset_random_strength": loss.noise_offset_random or None,
        "ss_multires_noise_iterations": multires,
        "ss_multires_noise_discount": loss.multires_discount if multires else None,
        "ss_ip_noise_gamma": loss.input_perturbation or None,
        "ss_loss_type": kind,
        "ss_huber_schedule": loss.huber_schedule if kind == "huber" else None,
        "ss_huber_c": loss.huber_c if kind == "huber" else None,
        "sushi_research.objective": json.dumps(changed) if changed else None,
    }
