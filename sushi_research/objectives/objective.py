"""The training objective of a run."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from sushi_research.config import TrainingConfig
from sushi_research.config.loss import gamma_of, weighting_of
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
    schedule = make_schedule(prediction)
    weights, c = chosen_weights(config, prediction), None
    if weights is not None:
        weights = weights.to(device)
    if config.loss.type in WITH_C:
        c = c_table(config.loss.huber_schedule, config.loss.huber_c, schedule).to(device)
    noise = Noise(
        offset=config.loss.noise_offset,
        offset_random=config.loss.noise_offset_random,
        multires_iterations=config.loss.multires_iterations,
        multires_discount=config.loss.multires_discount,
        input_perturbation=config.loss.input_perturbation,
    )
    chosen, loss = chosen_timesteps(config, device), Loss(config.loss.type, c)
    return Objective(schedule.to(device), prediction.type, weights, loss, noise, chosen, dropout)


def chosen_weights(config: TrainingConfig, prediction: PredictionLike) -> torch.Tensor | None:
    """The weight of the loss at each timestep, [T] float32 on the CPU, of the weighting that the config chose; None for none."""
    name = weighting_of(config.loss.weighting, config.loss.snr_gamma)
    if name == "none":
        return None
    p2 = {"p2_k": config.loss.p2_k, "p2_gamma": config.loss.p2_gamma}
    gamma = gamma_of(config.loss.snr_gamma)
    return loss_weights(name, make_schedule(prediction), prediction.type, gamma=gamma, **p2)


def chosen_timesteps(config: TrainingConfig, device: torch.device) -> Timesteps:
    """The timesteps that the config chose, with their cumulative probabilities on the device."""
    first, last = config.timesteps.min, config.timesteps.max
    if config.timesteps.distribution == "uniform":
        return Timesteps(first, last)
    mean = config.timesteps.mean if config.timesteps.distribution == "logit_normal" else 0.0
    return Timesteps(first, last, logit_normal(last - first + 1, mean, config.timesteps.std).to(device))
