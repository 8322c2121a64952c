"""The state that a training step changes: master weights, optimizer and loss scaler, saved and loaded together."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sushi_research.errors import NotFinite, UserError, first_line
from sushi_research.runs.checkpoint import Checkpoint, save_checkpoint
from sushi_research.runs.job import Job
from sushi_research.runs.metrics_file import MetricsFile
from sushi_research.training import optim, optimizer_state, parameter_groups
from sushi_research.training.averages import WeightAverages
from sushi_research.training.master_weights import MasterWeights
from sushi_research.training.max_norm import MaxNorm
from sushi_research.training.parameter_groups import Group
from sushi_research.training.resume import RunState
from sushi_research.training.run_plan import Plan

# GradScaler starts at a scale of 2^16 and halves it at each step whose gradients overflow, so a run may skip 16 steps in a row
# until a scale fits. At 1 the loss is not enlarged any more: gradients that overflow even there do so at every scale that is of
# use, because below 1 the small gradients are rounded to zero.
SMALLEST_SCALE = 1.0


@dataclass
class TrainState:
    """Everything that the next step depends on, apart from the config and the step number.

    `groups` are the parameter groups of the optimizer; `max_norm` is the limit of lora.max_norm; `averages` are those of `ema`.
    `skipped_steps` counts the steps that the loss scaler has skipped in the whole run; no step depends on it, nor on the averages.
    """

    master_weights: MasterWeights
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    groups: Sequence[Group] = ()
    max_norm: MaxNorm | None = None
    averages: WeightAverages | None = None
    skipped_steps: int = 0

    def __post_init__(self) -> None:
        self.freeze_ended(0)  # groups that are never trained

    def freeze_ended(self, step: int) -> bool:
        """Freezes the groups that are not trained in the step of this number, from 0. True if one was trained until now: a
        recording of the step has to be dropped then."""
        ended = [number for number, group in enumerate(self.groups) if group.has_ended(step)]
        if not self.master_weights.freeze(ended):
            return False
        if self.max_norm is not None:
            self.max_norm.leave({name for number in ended for name in self.groups[number].names})
        return True

    def step_optimizer(self, step: int, steps: int) -> None:
        """One step of the optimizer, and after it the limit of norms and the averages, the `step`-th of `steps`. In fp16 the
        optimizer's is skipped if gradients overflowed (`make_scaler`).

        Raises UserError, without changing the weights, if it was skipped at a loss scale that should not become smaller, or if all
        steps of the run were skipped, so that nothing was learned. Both follow from what a checkpoint holds.
        """
        scale = self.scaler.get_scale()
        with self.master_weights.frozen_kept():
            self.scaler.step(self.optimizer)
        self.scaler.update()
        is_skipped = self.scaler.get_scale() < scale
        if self.max_norm is not None:
            self.max_norm.forget() if is_skipped else self.max_norm.apply()
        if self.averages is not None:
            self.averages.update(step)
        if not is_skipped:
            return
        self.skipped_steps += 1
        if scale <= SMALLEST_SCALE:
            raise NotFinite(
                f"the gradients at step {step} overflow fp16 even at a loss scale of {scale:g}, after {self.skipped_steps - 1} "
                "skipped steps: the last checkpoint is intact; start a new run (another --run.name) with train.precision bf16 or "
                "fp32, or with a lower optimizer.lr."
            )
        if self.skipped_steps == step == steps:
            raise UserError(
                f"fp16 skipped all {steps} steps because their gradients overflowed, so the adapter has learned nothing (the loss "
                f"scale is {scale / 2:g} now): train for more steps, or start a new run (another --run.name) with train.precision "
                "bf16 or fp32."
            )

    def metrics(self) -> dict[str, float | None]:
        """Metrics to log after a step: `skipped_steps` so far in fp16, `d` of optimizers that estimate a step size, the learning
        rate of each parameter group if they are not all the same, and the norms that lora.max_norm limits."""
        found: dict[str, float | None] = {"skipped_steps": self.skipped_steps} if self.scaler.is_enabled() else {}
        estimate = optim.step_size_estimate(self.optimizer)
        if estimate is not None:
            found["d"] = estimate
        if parameter_groups.differ(self.groups):
            numbers = optim.group_numbers(self.optimizer)
            for number, group in zip(numbers, self.optimizer.param_groups, strict=True):
                found[f"lr/{self.groups[number].label}"] = group["lr"] * (1 if estimate is None else estimate)
        return found if self.max_norm is None else found | self.max_norm.metrics()

    def averaged_weights(self) -> contextlib.AbstractContextManager[None]:
        """A block in which the weights are those to export (`optim.averaged_weights`)."""
        return optim.averaged_weights(self.optimizer, self.master_weights)

    def evaluated_weights(self) -> contextlib.AbstractContextManager[None]:
        """A block in which the weights are those to evaluate and sample: with ema.evaluate an average, else those to export."""
        if self.averages is not None and self.averages.evaluated is not None:
            return self.averages.used()
        return self.averaged_weights()

    def load(self, checkpoint: Checkpoint | None) -> None:
        """Restores all of it from the checkpoint. Does nothing for None (a new run).

        UserError if the checkpoint holds another state, such as that of another adapter or optimizer.
        """
        if checkpoint is None:
            return
        state = checkpoint.load()
        parts = ("adapter", "optimizer", "scaler")
        if not isinstance(state, dict) or not all(isinstance(state.get(part), dict) for part in parts):
            raise checkpoint.foreign(f"it lacks one of {', '.join(parts)}")
        if problem := self.master_weights.problem_of(state["adapter"]):
            raise checkpoint.foreign(problem)
        if self.averages is not None and (problem := self.averages.problem_of(state.get("averages"))):
            raise checkpoint.foreign(problem)
        self.master_weights.load(state["adapter"])
        if self.averages is not None:
            self.averages.load(state["averages"])
        try:
            optimizer_state.load_named_state(self.optimizer, self.master_weights, state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
        except optimizer_state.ForeignState as error:
            raise checkpoint.foreign(str(error)) from error
        except Exception as error:  # each optimizer has errors of its own for a state that is not its own
            raise checkpoint.foreign(f"{type(error).__name__}: {first_line(error)}") from error
        self.skipped_steps = state.get("skipped_steps", 0)  # checkpoints of older versions have no count

    def save(self, job: Job, run_state: RunState, plan: Plan, step: int) -> None:
        """Syncs the logged metrics to disk, then saves the checkpoint of `step`. Only the main process may call this."""
        assert job.run is not None
        MetricsFile(job.run.metrics).sync()
        state = {
            "adapter": self.master_weights.named_state(),
            "optimizer": optimizer_state.named_state(self.optimizer, self.master_weights),
            "scaler": self.scaler.state_dict(),
            "skipped_steps": self.skipped_steps,
        }
        if self.averages is not None:
            state["averages"] = self.averages.state()
        facts = {
            "samples_seen": step * plan.global_batch_size,
            "epoch": step * plan.global_batch_size / plan.items_per_epoch,
            "world": job.world,
            "identity": run_state.identity,
        }
        save_checkpoint(job.run.checkpoints, step, state, facts, job.config.checkpoint.keep)
