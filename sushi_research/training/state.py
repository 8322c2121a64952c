"""The state that a training step changes: master weights, optimizer and loss scaler, saved and loaded together."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sushi_research.errors import first_line
from sushi_research.runs.checkpoint import Checkpoint, save_checkpoint
from sushi_research.runs.job import Job
from sushi_research.runs.metrics_file import MetricsFile
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
        """Restores all three from the checkpoint. Does nothing for None (a new run).

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
        self.master_weights.load(state["adapter"])
        try:
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
        except Exception as error:  # each optimizer has errors of its own for a state that is not its own
            raise checkpoint.foreign(f"{type(error).__name__}: {first_line(error)}") from error

    def save(self, job: Job, run_state: RunState, plan: Plan, step: int) -> None:
        """Syncs the logged metrics to disk, then saves the checkpoint of `step`. The main process writes, the others wait."""
        assert job.run is not None
        with job.main_process_writes():
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
