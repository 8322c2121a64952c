"""The state that a training step changes: master weights, optimizer and loss scaler, saved and loaded together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from sushi_research.runs.checkpoint import Checkpoint, save_checkpoint
from sushi_research.runs.job import Job
from sushi_research.runs.tracking import MetricsFile
from sushi_research.training.master_weights import MasterWeights
from sushi_research.training.plan import Plan
from sushi_research.training.resume import RunState


@dataclass(frozen=True)
class TrainState:
    """Everything that the next step depends on, apart from the config and the step number."""

    master_weights: MasterWeights
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler

    def load(self, checkpoint: Checkpoint | None) -> None:
        """Restores all three from the checkpoint. Does nothing for None (a new run)."""
        if checkpoint is None:
            return
        state = checkpoint.load()
        self.master_weights.load(state["adapter"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])

    def save(self, job: Job, run_state: RunState, plan: Plan, step: int) -> None:
        """Syncs the logged metrics to disk, then saves the checkpoint of `step`. The main process writes, the others wait."""
        with job.main_process_writes():
            if job.is_main:
                self._write(job, run_state, plan, step)

    @contextlib.contextmanager
    def saved_if_interrupted(self, job: Job, run_state: RunState, plan: Plan, step: int) -> Iterator[None]:
        """A block between two steps that is no part of the training: if it ends with an error or a stop, `step` is saved.

        The other processes are not waited for, because they may have ended.
        """
        try:
            yield
        except BaseException:
            if job.is_main and step > run_state.step:
                self._write(job, run_state, plan, step)
            raise

    def _write(self, job: Job, run_state: RunState, plan: Plan, step: int) -> None:
        assert job.run is not None
        MetricsFile(job.run.metrics).sync()
        state = {
            "adapter": self.master_weights.named_state(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        facts = {
            "samples_seen": step * plan.global_batch_size,
            "epoch": step * plan.global_batch_size / plan.items_per_epoch,
            "world": job.world,
            "identity": run_state.identity,
        }
        save_checkpoint(job.run.checkpoints, step, state, facts, job.config.checkpoint.keep)
