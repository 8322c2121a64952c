"""Initial values of adapters: functions of the seed, the module's name and the tensor."""

from __future__ import annotations

import math

import numpy as np
import torch

from sushi_research import randomness


def initial_down(seed: int, name: str, shape: tuple[int, ...], init: str) -> torch.Tensor:
    """The initial A of one module, fp32; `shape` is [rank, in] or, for a convolution, [rank, in, k, k].

    peft's distributions. `default`: uniform in +-1/sqrt(fan in), which is kaiming_uniform with a = sqrt(5); `gaussian`: normal
    with standard deviation 1/rank.
    """
    assert init in ("default", "gaussian"), init
    generator = randomness.key(seed, "adapter-init", name)
    if init == "gaussian":
        values = generator.standard_normal(shape, dtype=np.float32) / np.float32(shape[0])
        return torch.from_numpy(values)
    return _uniform(generator, shape)


def kaiming_uniform(seed: int, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Uniform in +-1/sqrt(fan in), fp32. `name` is that of the tensor."""
    return _uniform(randomness.key(seed, "adapter-init", name), shape)


def normal(seed: int, name: str, shape: tuple[int, ...], std: float) -> torch.Tensor:
    """Normal with this standard deviation, fp32. `name` is that of the tensor."""
    values = randomness.key(seed, "adapter-init", name).standard_normal(shape, dtype=np.float32)
    return torch.from_numpy(values * np.float32(std))


def _uniform(generator: np.random.Generator, shape: tuple[int, ...]) -> torch.Tensor:
    bound = np.float32(1 / math.sqrt(math.prod(shape[1:])))
    return torch.from_numpy((2 * generator.random(shape, dtype=np.float32) - 1) * bound)
