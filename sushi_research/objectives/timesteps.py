"""Which timesteps are trained, and how often."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sushi_research.objectives.draws import Draws
from sushi_research.objectives.schedule import NUM_TIMESTEPS


@dataclass(frozen=True)
class Timesteps:
    """The timesteps from `first` to `last`, both included, by their index in the schedule (0 has the least noise).

    `cumulative`, [last - first + 1] float32 on the device, is the probability of a timestep up to each; None if all are equally
    probable.
    """

    first: int = 0
    last: int = NUM_TIMESTEPS - 1
    cumulative: torch.Tensor | None = None

    def probabilities(self) -> torch.Tensor:
        """The probability of each timestep of the schedule, [T] float64 on the CPU; 0 outside of `first` to `last`."""
        count = self.last - self.first + 1
        found = torch.zeros(NUM_TIMESTEPS, dtype=torch.float64)
        if self.cumulative is None:
            found[self.first : self.last + 1] = 1 / count
        else:
            found[self.first : self.last + 1] = (
                self.cumulative.double().cpu().diff(prepend=torch.zeros(1, dtype=torch.float64))
            )
        return found


def draw_timesteps(batch: Draws, choice: Timesteps) -> torch.Tensor:
    """A timestep for each sample, [B] int64."""
    if choice.cumulative is None:
        drawn = batch.integers("timestep", choice.last - choice.first + 1)
    else:
        # Comparing gives the same on every device, which a function such as the sigmoid does not.
        drawn = torch.searchsorted(choice.cumulative, batch.uniform("timestep"), right=True)
    return drawn + choice.first if choice.first else drawn


def logit_normal(count: int, mean: float = 0.0, std: float = 1.0) -> torch.Tensor:
    """The cumulative probabilities, [count] float32, of floor(count sigmoid(mean + std n)) with n standard normal.

    Logit-normal timesteps (Esser et al. 2024, arXiv 2403.03206, equation 19): the middle of the schedule is trained most, and a
    mean above 0 prefers more noise. With mean 0 they are kohya's "sigmoid", where std is called sigmoid_scale. diffusers' training
    scripts count their scheduler's timesteps from the end, so that the same number is a mean of the other sign there.
    """
    edges = torch.arange(1, count, dtype=torch.float64) / count
    below = torch.special.ndtr((torch.logit(edges) - mean) / std)
    return torch.cat([below, torch.ones(1, dtype=torch.float64)]).float()
