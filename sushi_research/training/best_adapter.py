"""Keeps the adapter of the best evaluated step (`evaluation.keep_best`), written at the evaluation.

Which step is best follows from the recorded results alone (reports/best_step.py). So a resumed run decides as it did before, and a
file that was lost is made again if the checkpoint of its step is still there.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass

from sushi_research.adapters import chosen_step as metadata
from sushi_research.adapters.kohya_format import problem_of
from sushi_research.errors import UserError
from sushi_research.files import reason_of
from sushi_research.reports.best_step import StepOutcomes, chosen_step
from sushi_research.runs.checkpoint import checkpoint_of
from sushi_research.training import best_files
from sushi_research.training.adapter_output import AdapterWriter

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BestAdapter:
    """Keeps the adapter of the best step."""

    writer: AdapterWriter

    def keep(self, step: int) -> None:
        """Writes the adapter if `step`, which was just evaluated, is the best so far, and removes files that it supersedes.

        Call it where the weights are those that were evaluated. If the file cannot be written, for example because the disk is
        full or fp16 cannot hold a value, a warning says so, and the training goes on without it.
        """
        job = self.writer.job
        with job.main_process_writes():
            if not job.is_main or (outcomes := best_files.outcomes_of(job.run)) is None:
                return
            if chosen_step(outcomes) == step and problem_of(job.run.best_adapter(step)):
                with self._warned(step):
                    self._write(outcomes, step)
            best_files.remove_superseded(job.run)

    def make_again(self) -> None:
        """Makes the file of the best step again if it is lost and there is a checkpoint of its step; a warning if there is none.

        The state is that of the checkpoint from which the run goes on, before and after.
        """
        job, resumed_from = self.writer.job, self.writer.run_state.checkpoint
        with job.main_process_writes():
            if not job.is_main or resumed_from is None or (outcomes := best_files.outcomes_of(job.run)) is None:
                return
            step = chosen_step(outcomes)
            if step is None or not (problem := problem_of(job.run.best_adapter(step))):
                return
            checkpoint = checkpoint_of(job.run.checkpoints, step)
            if checkpoint is None:
                logger.warning(
                    "%s, and there is no checkpoint of step %d to make it again from: the run goes on without the adapter of that "
                    "step, which is the best so far",
                    problem,
                    step,
                )
                return
            state = self.writer.state
            try:
                state.load(checkpoint)
                with self._warned(step), state.evaluated_weights():
                    self._write(outcomes, step)
            finally:
                state.load(resumed_from)

    def _write(self, outcomes: StepOutcomes, step: int) -> None:
        val_set, run = self.writer.run_state.sets.validation, self.writer.job.run
        assert val_set is not None and run is not None
        among = sum(0 < each <= step for each in outcomes.steps)
        chosen = metadata.metadata_of(val_set.hash, val_set.names, step, among)
        self.writer.write(run.best_adapter(step), step, chosen)

    @contextlib.contextmanager
    def _warned(self, step: int) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            logger.warning(
                "%s: the run goes on without the adapter file of step %d, which is the best so far",
                reason_of(error),
                step,
            )


def prepare(writer: AdapterWriter) -> BestAdapter | None:
    """The keeper of the best adapter, with a lost file made again; None if it is not asked for or the run is not evaluated."""
    if not writer.job.config.evaluation.keep_best or writer.run_state.sets.validation is None:
        return None
    best = BestAdapter(writer)
    best.make_again()
    return best
