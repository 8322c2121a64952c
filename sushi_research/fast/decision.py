"""Whether the step of a run is recorded as a CUDA graph, and why not."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sushi_research.config import TrainingConfig

# More shapes than that run the same code without a recording: a recording takes a second to make, and some memory.
MOST_SHAPES = 32


@dataclass(frozen=True)
class StepPath:
    """How micro-batches run: "recorded", as a CUDA graph per shape, or "eager", for the reason `why`."""

    name: str
    why: str = ""

    @property
    def is_recorded(self) -> bool:
        return self.name == "recorded"

    def describe(self) -> str:
        """As the plan says it."""
        if self.is_recorded:
            return f"recorded: forward and backward as one CUDA graph for each shape of a micro-batch, {MOST_SHAPES} at most"
        return f"eager: {self.why}"


RECORDED = StepPath("recorded")


def decide(config: TrainingConfig, device: torch.device) -> StepPath:
    """The path that the settings and the device allow. A trial before the first step may still turn "recorded" into "eager"."""
    if device.type != "cuda":
        why = f"a {device.type.upper()} has no CUDA graphs"
    elif not config.train.record_step:
        why = "train.record_step is false"
    elif config.train.attention == "xformers":
        why = "the kernels of xformers are not known to be recordable (train.attention)"
    elif (key := _drops(config)) and config.train.gradient_checkpointing != "none":
        why = f"recomputing activations with dropout reads the random state, which a recording refuses (lora.{key})"
    else:
        return RECORDED
    return StepPath("eager", why)


def _drops(config: TrainingConfig) -> str | None:
    """The first dropout of the adapter that is set."""
    return next((key for key in ("dropout", "rank_dropout", "module_dropout") if getattr(config.lora, key)), None)
