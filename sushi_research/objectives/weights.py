"""Weights of the loss at each timestep, as tables that are computed once for a run."""

from __future__ import annotations

import torch

from sushi_research.objectives.schedule import Schedule
from sushi_research.objectives.targets import x0_factor


def min_snr_weights(schedule: Schedule, gamma: float, prediction_type: str) -> torch.Tensor:
    """Min-SNR-gamma loss weights, [T] float32 (Hang et al. 2023, arXiv 2303.09556).

    "epsilon": min(snr, gamma) / snr. "v_prediction": min(snr, gamma) / (snr + 1), which is 0 where the SNR is 0. The SNR is that
    of the schedule, so for zero terminal SNR it is the rescaled one; kohya uses the SNR before rescaling.
    """
    ratio = schedule.snr
    if prediction_type == "epsilon":
        return ratio.clamp(max=gamma) / ratio
    if prediction_type == "v_prediction":
        return ratio.clamp(max=gamma) / (ratio + 1.0)
    return (ratio.double().clamp(max=gamma) * x0_factor(schedule, prediction_type)).float()
