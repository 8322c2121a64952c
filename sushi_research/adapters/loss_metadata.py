"""What an adapter file's metadata says about the loss, the noise and the timesteps of its training."""

from __future__ import annotations

import json
from typing import Any

from sushi_research.config import TrainingConfig

# What sd-scripts calls them. Its smooth_l1 is none of ours.
_TYPES = {"l1": "l1", "pseudo_huber": "huber"}


def loss_entries(config: TrainingConfig) -> dict[str, Any]:
    """sd-scripts' keys where there is one of the same meaning, and `sushi_research.objective`; None for what is not used."""
    loss = config.loss
    multires, kind = loss.multires_iterations or None, _TYPES.get(loss.type)
    # The two that had their keys before are left out.
    changed = {
        "loss": loss.model_dump(exclude_defaults=True, exclude={"snr_gamma", "noise_offset"}),
        "timesteps": config.timesteps.model_dump(exclude_defaults=True),
    }
    changed = {section: values for section, values in changed.items() if values}
    return {
        "ss_min_snr_gamma": loss.gamma if loss.chosen_weighting == "min_snr" else None,
        "ss_debiased_estimation": loss.chosen_weighting == "debiased" or None,
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
