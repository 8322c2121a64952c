"""Averages of weights over the steps of a training: their decay at each step, and post-hoc EMA.

Two kinds. In both, the average after step t is `decay` times the one before and 1 - decay times the weights after step t, and the
decay of step 1 is 0: the weights before the first step are no part of it.

- Exponential: the weights of k steps ago count in proportion to decay^k. As the first steps are not enough for that, the factor is
  less there, as in Adam's bias correction (arXiv 1412.6980, algorithm 1).
- Power function (EDM2, arXiv 2312.02696, section 3.1): the weights at time tau of t count in proportion to tau^exponent, so the
  average is as long, relative to the training, at each of its steps. Its `length` is the standard deviation of that profile divided
  by t (sigma_rel).

Post-hoc EMA (section 3.2): snapshots of two such averages span nearly every other profile. The average of any length is their
linear combination whose profile is nearest to it. Here steps are discrete, and that is exact: with the decay of EDM2, step k of t
counts (k/t)^(exponent + 1) - ((k-1)/t)^(exponent + 1), the integral of the continuous profile over that step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# The lengths of the two averages that a run keeps, as in EDM2.
KEPT_LENGTHS = (0.05, 0.10)
# Lengths that can be asked for. A uniform average of all steps has 1 / sqrt(12) = 0.289.
SHORTEST, LONGEST = 0.005, 0.28
# Intervals of time in which profiles are compared; with fewer steps each step is one.
MOST_INTERVALS = 20_000


def exponential_decay(step: int, decay: float) -> float:
    """The factor at a step, from 1: decay (1 - decay^(step - 1)) / (1 - decay^step).

    With it the weights of step k of t count decay^(t - k), divided by the sum of these.
    """
    logarithm = math.log(decay)
    return decay * math.expm1((step - 1) * logarithm) / math.expm1(step * logarithm)


def exponent_of(length: float) -> float:
    """The exponent of the power function of this length: EDM2, equations 123 and 126 and algorithm 2."""
    inverse = length**-2
    return float(np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]).real.max())


def length_of(exponent: float) -> float:
    """The length of the power function of this exponent: EDM2, equation 123."""
    return math.sqrt((exponent + 1) / (exponent + 3)) / (exponent + 2)


def power_decay(step: int, exponent: float) -> float:
    """The decay at a step, from 1: (1 - 1/step)^(exponent + 1), EDM2, equation 127."""
    return (1 - 1 / step) ** (exponent + 1)


def mean_age(steps: int, decay: float) -> float:
    """How many steps old the weights are on average, in the exponential average after `steps` steps."""
    # The mean of a geometric distribution that is cut off: decay / (1 - decay) without an end.
    whole = -math.expm1(steps * math.log(decay))
    return decay / (1 - decay) - steps * (1 - whole) / whole


@dataclass(frozen=True)
class Combination:
    """The factors of snapshots in the reconstruction of an average; their sum is 1.

    `error` is the norm of the difference of the two profiles, divided by the norm of the wanted one. `spread` is the root of the
    sum of the factors' squares: by so much an independent error of each snapshot, such as its rounding, is enlarged.
    """

    factors: tuple[float, ...]
    error: float

    @property
    def spread(self) -> float:
        return math.sqrt(sum(factor**2 for factor in self.factors))


def reconstruct(snapshots: Sequence[tuple[int, float]], step: int, length: float) -> Combination:
    """How snapshots (step, length) combine to the average of this length after `step` steps; least squares, EDM2's algorithm 3.

    As there, the factors are divided by their sum. Snapshots of later steps must not be given.
    """
    assert snapshots and all(0 < of_step <= step for of_step, _ in snapshots)
    edges = np.unique(np.rint(np.linspace(0, step, min(step, MOST_INTERVALS) + 1)))
    # A profile's integral over an interval, divided by the root of its width: products of these are the integrals of products.
    scale = 1 / np.sqrt(np.diff(edges))
    basis = np.stack([_profile(edges, *each) * scale for each in snapshots], axis=1)
    wanted = _profile(edges, step, length) * scale
    factors = np.linalg.lstsq(basis, wanted, rcond=None)[0]
    factors /= factors.sum()
    error = np.linalg.norm(basis @ factors - wanted) / np.linalg.norm(wanted)
    return Combination(tuple(map(float, factors)), float(error))


def _profile(edges: np.ndarray, step: int, length: float) -> np.ndarray:
    """How much the intervals [N] between these times [N + 1] count in the power-function average after `step` steps."""
    return np.diff(np.minimum(edges / step, 1.0) ** (exponent_of(length) + 1))
