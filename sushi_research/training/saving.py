"""Saves a step of a run: its checkpoint, then the adapter file of that step; then the user's own command."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sushi_research import stopping
from sushi_research.adapters import snapshots
from sushi_research.adapters.kohya_format import problem_of
from sushi_research.errors import UserError
from sushi_research.files import reason_of
from sushi_research.runs.checkpoint import checkpoint_path
from sushi_research.training import checkpoint_command, page_output, step_files, thumbnail
from sushi_research.training.adapter_output import AdapterWriter
from sushi_research.training.averages import EXPONENTIAL, length_names

logger = logging.getLogger(__name__)


@dataclass
class Saver:
    """Saves the steps of a run. A step that is resumed from has its checkpoint; its adapter file is made again if it is lost."""

    writer: AdapterWriter
    _runs_command: bool = True
    # The step of NAME_ema.safetensors.
    _average_of: int = 0

    def save(self, step: int) -> None:
        """Saves the checkpoint of `step` and its adapter file. The main process writes, the others wait. Nothing for step 0."""
        if step == 0:
            return
        job, state = self.writer.job, self.writer.state
        is_new = step > self.writer.run_state.step
        with job.main_process_writes():
            if job.is_main and is_new:
                self._save_checkpoint(step)
        with state.averaged_weights(), job.main_process_writes():
            if job.is_main:
                self._write_adapter(step)
                if is_new:
                    self._run_command(step)

    def save_averages(self, step: int) -> None:
        """Keeps snapshots of the averages of ema.post_hoc, if they are due at `step` or it is the last. What cannot be written is a
        warning: the average of any length can be made without it, less exactly."""
        writer = self.writer
        job, plan, names = writer.job, writer.plan, length_names(writer.job.config.ema)
        if step == 0 or not names or not (step == plan.steps or plan.due.averages.at(step)):
            return
        job.timings.enter("saving")
        with job.main_process_writes():
            for name in names if job.is_main else ():
                try:
                    writer.write_snapshot(snapshots.path_of(job.run, step, name), step, name)
                except UserError as error:
                    logger.warning("%s: the run goes on without this snapshot of step %d", reason_of(error), step)

    @contextlib.contextmanager
    def saved_if_interrupted(self, step: int) -> Iterator[None]:
        """A block between two steps that is no part of the training: if it ends with an error or a stop, `step` is saved, and the
        run's page says so.

        The other processes are not waited for, because they may have ended.
        """
        job, steps = self.writer.job, self.writer.plan.steps
        try:
            yield
        except BaseException as error:
            ended, doing = "stopped" if stopping.cause(error) else "ended with an error", job.timings.current
            # The last step was saved before the block.
            if job.is_main and self.writer.run_state.step < step < steps:
                self._save_checkpoint(step)
                with self.writer.state.averaged_weights():
                    self._write_adapter(step)
                self._run_command(step)
            if job.is_main:
                page_output.write_last(job, step, f"{ended} while {doing} at step {step} of {steps}")
            raise

    def add_picture(self, step: int) -> None:
        """Puts the samples of `step`, which were just drawn, into the metadata of its adapter file (`thumbnail.add`)."""
        job = self.writer.job
        if job.is_main and step > 0:
            averages = self.writer.state.averages
            is_of_average = averages is not None and averages.evaluated is not None
            if is_of_average and self._average_of != step:
                return  # that file is of an earlier step
            path = job.run.average if is_of_average else self._path(step)
            try:
                thumbnail.add(job, path, step)
            except UserError as error:
                if step == self.writer.plan.steps and problem_of(path):
                    raise  # a finished run has a whole file
                logger.warning(
                    "%s: the run goes on without the picture of step %d in the adapter file", reason_of(error), step
                )

    def _path(self, step: int) -> Path:
        """The adapter file of a step."""
        run = self.writer.job.run
        assert run is not None
        return run.adapter if step == self.writer.plan.steps else run.step_adapter(step)

    def _run_command(self, step: int) -> None:
        job = self.writer.job
        assert job.run is not None
        if self._runs_command:
            checkpoint = checkpoint_path(job.run.checkpoints, step)
            self._runs_command = checkpoint_command.run(job, step, checkpoint, self._path(step))

    def _save_checkpoint(self, step: int) -> None:
        writer = self.writer
        writer.state.save(writer.job, writer.run_state, writer.plan, step)

    def _write_adapter(self, step: int) -> None:
        """Writes NAME.safetensors at the last step, else the file of the step unless it is there.

        If a file on the way cannot be written, for example because the disk is full or fp16 cannot hold a value, a warning says so,
        and the training goes on. NAME_ema.safetensors is written at each of these steps, in place of the one before.
        """
        self._write_average(step)
        run, keep = self.writer.job.run, self.writer.job.config.checkpoint.keep_adapters
        assert run is not None
        path = self._path(step)
        if step == self.writer.plan.steps:
            self.writer.write(path, step)
            if keep:  # the file of an earlier end has become that of its step
                step_files.keep_latest(run, keep)
        elif keep != 0 and not self.writer.has_written(path):
            if os.path.lexists(path):
                logger.warning("%s is damaged or not the adapter of step %d: it is written again", path, step)
            try:
                self.writer.write(path, step)
            except UserError as error:
                logger.warning("%s: the run goes on without the adapter file of step %d", reason_of(error), step)
            step_files.keep_latest(run, keep)

    def _write_average(self, step: int) -> None:
        """Writes the average of ema.decay, if there is one and its file is another one. At the last step a failure is an error."""
        writer, run = self.writer, self.writer.job.run
        assert run is not None
        if writer.job.config.ema.decay is None:
            return
        try:
            if not writer.has_written(run.average, EXPONENTIAL):
                writer.write(run.average, step, average=EXPONENTIAL)
            self._average_of = step
        except UserError as error:
            if step == writer.plan.steps:
                raise
            logger.warning("%s: the run goes on without the average of step %d", reason_of(error), step)
