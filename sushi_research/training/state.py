"""What a training step changes: the master weights, the optimizer and the loss scaler; saved and loaded as one."""

from __future__ import annotations

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
    """All that the next step depends on, besides what is a function of the config and the step's number."""

    master_weights: MasterWeights
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler

    def load(self, checkpoint: Checkpoint | None) -> None:
        """Sets all three to the checkpoint's state; None, where a run begins, changes nothing."""
        if checkpoint is None:
            return
        state = checkpoint.load()
        self.master_weights.load(state["adapter"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])

    def save(self, job: Job, run_state: RunState, plan: Plan, step: int) -> None:
        """Saves the checkpoint of `step`, after the logged metrics. The main process writes, the others wait."""
        assert job.run is not None
        if job.is_main:
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
        job.accelerator.wait_for_everyone()
