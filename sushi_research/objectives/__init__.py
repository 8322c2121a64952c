"""The mathematics of training, as pure functions on tensors: schedule, noise, target, loss and its weights.

Everything that a training step calls is here by name: `objectives.add_noise`, `objectives.target` ...
"""

from sushi_research.objectives.latents import posterior_sample
from sushi_research.objectives.losses import Loss, loss_per_sample, mse_per_sample
from sushi_research.objectives.noise import Noise, draw_noise, perturb_input
from sushi_research.objectives.objective import Objective, make_objective
from sushi_research.objectives.schedule import (
    NUM_TIMESTEPS,
    Schedule,
    add_noise,
    alphas_cumprod,
    diffusion_schedule,
    flow_schedule,
    make_schedule,
    timestep_bin,
)
from sushi_research.objectives.targets import prior_target, target, x0_factor
from sushi_research.objectives.timesteps import Timesteps, draw_timesteps
from sushi_research.objectives.weights import loss_weights

__all__ = [
    "NUM_TIMESTEPS",
    "Loss",
    "Noise",
    "Objective",
    "Schedule",
    "Timesteps",
    "add_noise",
    "alphas_cumprod",
    "diffusion_schedule",
    "draw_noise",
    "draw_timesteps",
    "flow_schedule",
    "loss_per_sample",
    "loss_weights",
    "make_objective",
    "make_schedule",
    "mse_per_sample",
    "perturb_input",
    "posterior_sample",
    "prior_target",
    "target",
    "timestep_bin",
    "x0_factor",
]
