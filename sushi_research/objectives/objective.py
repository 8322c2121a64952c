"""The training objective of a run."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from sushi_research.config import TrainingConfig
from sushi_research.objectives.losses import WITH_C, Loss, c_table
from sushi_research.objectives.noise import Noise
from sushi_research.objectives.schedule import PredictionLike, Schedule, make_schedule
from sushi_research.objectives.timesteps import Timesteps, logit_normal
from sushi_research.objectives.weights import loss_weights


@dataclass(frozen=True)
class Objective:
    """The training objective, constant during a run. Its tables are on the device; `weights` is [T] float32, or None for 1."""

    schedule: Schedule
    prediction_type: str
    weights: torch.Tensor | None = None
    loss: Loss = field(default_factory=Loss)
    noise: Noise = field(default_factory=Noise)
    timesteps: Timesteps = field(default_factory=Timesteps)
    dropout: float = 0.0


def make_objective(
    config: TrainingConfig, prediction: PredictionLike, device: torch.device, dropout: float = 0.0
) -> Objective:
    """The objective that the config asks for, of a base with this prediction. `dropout` is the adapter's."""
    loss, schedule = config.loss, make_schedule(prediction)
    weights, c = None, None
    if loss.chosen_weighting != "none":
        p2 = {"p2_k": loss.p2_k, "p2_gamma": loss.p2_gamma}
        weights = loss_weights(loss.chosen_weighting, schedule, prediction.type, gamma=loss.gamma, **p2).to(device)
    if loss.type in WITH_C:
        c = c_table(loss.huber_schedule, loss.huber_c, schedule).to(device)
    noise = Noise(
        offset=loss.noise_offset,
        offset_random=loss.noise_offset_random,
        multires_iterations=loss.multires_iterations,
        multires_discount=loss.multires_discount,
        input_perturbation=loss.input_perturbation,
    )
    chosen = Timesteps(config.timesteps.min, config.timesteps.max, _cumulative(config, device))
    return Objective(schedule.to(device), prediction.type, weights, Loss(loss.type, c), noise, chosen, dropout)


def _cumulative(config: TrainingConfig, device: torch.device) -> torch.Tensor | None:
    """The cumulative probabilities of the chosen timesteps (`Timesteps`)."""
    section = config.timesteps
    if section.distribution == "uniform":
        return None
    mean = section.mean if section.distribution == "logit_normal" else 0.0
    return logit_normal(section.max - section.min + 1, mean, section.std).to(device)
