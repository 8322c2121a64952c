"""Averages of the master weights over the steps of a run (`ema`), each a flat buffer in fp32 next to the weights.

An update is one `lerp` for all tensors together, computed alike in every process. What is averaged is what an adapter file holds:
the factors of each module, its magnitude and the vectors of new tokens, and not the change of the layer that they make.

The decays are those of adapters/averaging.py: exponential, and EDM2's power function (Karras et al. 2023, arXiv 2312.02696,
equation 1 for the profile and 2 for the update, which is 127 in its appendix).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

from sushi_research.adapters.averaging import KEPT_LENGTHS, exponent_of, exponential_decay, power_decay
from sushi_research.config import TrainingConfig
from sushi_research.config.ema import EmaSection
from sushi_research.training.master_weights import MasterWeights

# The name of the average of ema.decay. Those of ema.post_hoc are named after their lengths.
EXPONENTIAL = "exponential"


def length_name(length: float) -> str:
    """The name of a power-function average: 0.05, 0.10."""
    return f"{length:.2f}"


def names_of(section: EmaSection) -> list[str]:
    """The names of the averages that a run keeps."""
    return ([] if section.decay is None else [EXPONENTIAL]) + length_names(section)


def length_names(section: EmaSection) -> list[str]:
    """The names of the power-function averages that a run keeps, none without ema.post_hoc."""
    return [length_name(length) for length in KEPT_LENGTHS] if section.post_hoc else []


def snapshot_dtype(config: TrainingConfig) -> torch.dtype:
    """The dtype of snapshots: fp16, or fp32 if the run's adapter files are. docs/ema.md has what the rounding does."""
    return torch.float32 if config.lora.save_dtype == "float32" else torch.float16


class WeightAverages:
    """The averages of a run by name. `in_use` is the one that is in the place of the weights, None outside `used`."""

    def __init__(self, section: EmaSection, master_weights: MasterWeights) -> None:
        """They begin at the master weights, which they are before the first step."""
        self.evaluated = EXPONENTIAL if section.evaluate else None
        self.in_use: str | None = None
        self._master_weights, self._section = master_weights, section
        self._decays: dict[str, Callable[[int], float]] = {}
        if section.decay is not None:
            self._decays[EXPONENTIAL] = partial(exponential_decay, decay=section.decay)
        if section.post_hoc:
            for length in KEPT_LENGTHS:
                self._decays[length_name(length)] = partial(power_decay, exponent=exponent_of(length))
        self._buffers = {name: master_weights.values.clone() for name in self._decays}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights after step `step`, from 1. A step that fp16 skipped counts too: its weights are those before it."""
        for name, decay in self._decays.items():
            self._buffers[name].lerp_(self._master_weights.values, 1 - decay(step))

    def named_state(self, name: str) -> dict[str, torch.Tensor]:
        """An average by the names of the adapter's tensors. They are views: save them before the next step."""
        return self._master_weights.named_views(self._buffers[name])

    def describe(self, name: str) -> str:
        """What an average is, for the metadata of its file."""
        return f"exponential, decay {self._section.decay}" if name == EXPONENTIAL else f"power function, length {name}"

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """A block in which the average of ema.evaluate is in the place of the weights, which are restored bit for bit."""
        assert self.evaluated is not None and self.in_use is None
        with self._master_weights.replaced_by(self._buffers[self.evaluated]):
            self.in_use = self.evaluated
            try:
                yield
            finally:
                self.in_use = None

    def state(self) -> dict[str, dict[str, torch.Tensor]]:
        """For a checkpoint: the tensors of each average by name."""
        return {name: self.named_state(name) for name in self._buffers}

    def problem_of(self, state: Any) -> str | None:
        """How `state` differs from what `state()` gives; None if it has the same averages of the same tensors."""
        if not isinstance(state, Mapping) or state.keys() != self._buffers.keys():
            return f"it lacks the averages {', '.join(self._buffers)}"
        problems = (self._master_weights.problem_of(state[name]) for name in self._buffers)
        return next((f"of its averages, {problem}" for problem in problems if problem), None)

    @torch.no_grad()
    def load(self, state: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """Sets the averages to those of `state()`."""
        problem = self.problem_of(state)
        assert problem is None, problem
        for name in self._buffers:
            for tensor, view in self.named_state(name).items():
                view.copy_(state[name][tensor])


def averages_of(section: EmaSection, master_weights: MasterWeights) -> WeightAverages | None:
    """The averages of a run; None without any."""
    return WeightAverages(section, master_weights) if names_of(section) else None
