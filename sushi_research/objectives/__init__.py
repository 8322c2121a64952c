"""The mathematics of training, as pure functions on tensors: schedule, noise, target, loss and its weights.

Everything that a training step calls is here by name: `objectives.add_noise`, `objectives.target` ...
"""

from sushi_research.objectives.latents import posterior_sample
from sushi_research.objectives.losses import mse_per_sample
from sushi_research.objectives.noise import offset_noise
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
from sushi_research.objectives.weights import min_snr_weights

__all__ = [
    "NUM_TIMESTEPS",
    "Objective",
    "Schedule",
    "add_noise",
    "alphas_cumprod",
    "diffusion_schedule",
    "flow_schedule",
    "make_objective",
    "make_schedule",
    "min_snr_weights",
    "mse_per_sample",
    "offset_noise",
    "posterior_sample",
    "prior_target",
    "target",
    "timestep_bin",
    "x0_factor",
]
