"""The training objective of a run."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sushi_research.config import TrainingConfig
from sushi_research.objectives.schedule import PredictionLike, Schedule, make_schedule
from sushi_research.objectives.weights import min_snr_weights


@dataclass(frozen=True)
class Objective:
    """The training objective, constant during a run. Its tables are on the device; `weights` is [T] float32, or None for 1."""

    schedule: Schedule
    prediction_type: str
    weights: torch.Tensor | None = None
    noise_offset: float = 0.0
    dropout: float = 0.0


def make_objective(
    config: TrainingConfig, prediction: PredictionLike, device: torch.device, dropout: float = 0.0
) -> Objective:
    """The objective that the config asks for, of a base with this prediction. `dropout` is the adapter's."""
    schedule, gamma = make_schedule(prediction), config.loss.snr_gamma
    weights = None if gamma is None else min_snr_weights(schedule, gamma, prediction.type).to(device)
    return Objective(
        schedule.to(device),
        prediction.type,
        weights=weights,
        noise_offset=config.loss.noise_offset,
        dropout=dropout,
    )
