"""The job of one command: its config, model module, processes, precision and run folder."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list

from sushi_research.config import TrainingConfig
from sushi_research.config.command_line import config_to_dict
from sushi_research.config.keys import default_values
from sushi_research.config.sets import sets_of
from sushi_research.errors import UserError
from sushi_research.files import system_errors
from sushi_research.precision import COMPUTE_DTYPES, make_scaler
from sushi_research.progress import StageTimings
from sushi_research.runs import identity
from sushi_research.runs.dry_run import DryRun
from sushi_research.runs.run_folder import RunFolder
from sushi_research.terminal import say


@dataclass(frozen=True)
class Job:
    """What every part of a command needs. It does not change after the start.

    `model` is the model module of the architecture; `precision` is resolved ("bf16", "fp16" or "fp32"), for `precision_reason`;
    `run` is None if no run is trained (dry run, caches, evaluation of files); `started` is in seconds since the epoch; `code` is
    that of `code.code_of`, which only the main process has. `dry_run` is the folder of a dry run, None for all else.
    `start` is the adapter that lora.start_from names (training/starting_point.StartingPoint), None without.
    """

    config: TrainingConfig
    model: ModuleType
    accelerator: Accelerator
    precision: str
    run: RunFolder | None = None
    started: float = field(default_factory=time.time)
    code: dict[str, Any] = field(default_factory=dict)
    start: Any = None
    timings: StageTimings = field(default_factory=lambda: StageTimings.of_process("planning"))
    precision_reason: str = ""
    dry_run: DryRun | None = None

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def world(self) -> int:
        """The number of processes."""
        return self.accelerator.num_processes

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    @property
    def compute_dtype(self) -> torch.dtype:
        return COMPUTE_DTYPES[self.precision]

    @property
    def global_batch_size(self) -> int:
        """G of rule 7 in CONTRIBUTING.md: the samples of one optimizer step, over all processes."""
        return self.config.train.batch_size * self.config.train.accumulation * self.world

    @cached_property
    def run_path(self) -> Path:
        """The path of the run's folder, also for a dry run, which does not make it."""
        config = self.config
        facts = {"global_batch_size": self.global_batch_size, "precision": self.precision}
        settings = identity.run_identity(config_to_dict(config), facts)
        defaults = default_values(type(config))
        path = sets_of(config)[0].path
        name = config.run.name or identity.default_name(self.model.NAME, path, settings, defaults)
        return Path(config.run.folder, name)

    @cached_property
    def scaler(self) -> torch.amp.GradScaler:
        """The loss scaler of the precision. It lives as long as the job; TrainState saves and loads it."""
        return make_scaler(self.precision, self.device)

    def note_stop(self) -> None:
        """Notes in the run folder that the run was asked to stop. A dry run has none."""
        if self.run is not None:
            self.run.note_stop()

    def say(self, *lines: str) -> None:
        """Prints lines in the main process (`terminal.say`)."""
        if self.is_main:
            say(*lines)

    @contextlib.contextmanager
    def main_process_writes(self) -> Iterator[None]:
        """A block in which only the main process does something, and which all processes leave together.

        If it ends with a UserError in the main process, or with an OSError about a file, all processes end (`agree`).
        """
        error = None
        try:
            with system_errors():
                yield
        except UserError as found:
            error = found
        agree(error)

    def sharing(self) -> dict[str, Any]:
        """The keyword arguments of `validation_set.losses` and `Drift` for sharing work between processes."""
        reduce: Callable[[torch.Tensor], torch.Tensor] | None = None
        if self.world > 1:
            reduce = lambda found: self.accelerator.reduce(found, "sum")  # noqa: E731
        return {"device": self.device, "rank": self.rank, "world": self.world, "reduce": reduce}


def agree(error: UserError | None) -> None:
    """Ends all processes if the main process has a UserError: it raises the error, the others exit silently with status 2.

    Otherwise the others would wait for the main process until they fail with a traceback of the network library.
    """
    failed = broadcast_object_list([error is not None])[0]
    if failed and not PartialState().is_main_process:
        raise SystemExit(2)  # also for an error of its own, which the main process has too
    if error is not None:
        raise error
