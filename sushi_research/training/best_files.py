"""The files NAME-best-STEP.safetensors of a run: the adapter of its best evaluated step.

As long as a run may go on from a checkpoint before the evaluation that superseded a file, that file stays. So at most two are kept,
and a run that was stopped and resumed has the same files as one that was not.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from sushi_research.adapters.kohya_format import problem_of
from sushi_research.errors import UserError
from sushi_research.files import CannotWrite, remove
from sushi_research.reports import run_outcomes
from sushi_research.reports.best_step import StepOutcomes, chosen_step
from sushi_research.runs.checkpoint import checkpoint_of, newest_step
from sushi_research.runs.run_folder import RunFolder

logger = logging.getLogger(__name__)


def outcomes_of(run: RunFolder) -> StepOutcomes | None:
    """What decides between the run's evaluated steps. UserError if a file is damaged."""
    found = run_outcomes.read(run)
    if found.problems:
        raise UserError(found.problems[0])
    return found.of_steps()


@dataclass(frozen=True)
class Lost:
    """The file of a run's best step that is missing or damaged: a sentence, and whether a checkpoint gives it again."""

    path: Path
    problem: str
    can_be_made: bool


def lost(run: RunFolder) -> Lost | None:
    """What is wrong with the file of the best step of a run; None if it is whole, or if no step is best."""
    try:
        outcomes = outcomes_of(run)
    except UserError:
        return None  # evaluation_records.changes says it
    step = chosen_step(outcomes) if outcomes else None
    if step is None or not (problem := problem_of(run.best_adapter(step))):
        return None
    return Lost(run.best_adapter(step), problem, checkpoint_of(run.checkpoints, step) is not None)


def cut_back(run: RunFolder, step: int) -> None:
    """Removes the files of steps after `step`, from which the run resumes; -1 removes all."""
    for of_step, path in run.best_adapters().items():
        if of_step > step:
            remove(path)


def remove_superseded(run: RunFolder) -> None:
    """Removes all files but that of the best step and that of the best step up to the newest checkpoint.

    Nothing is removed if the file of the best step could not be written. A file that cannot be removed is a warning.
    """
    try:
        outcomes, newest = outcomes_of(run), newest_step(run.checkpoints)
    except UserError:
        return  # the run's page says it
    best = chosen_step(outcomes) if outcomes else None
    if best is None or not run.best_adapter(best).is_file():
        return
    wanted = {best} if newest is None else {best, chosen_step(outcomes, newest)}
    for step, path in run.best_adapters().items():
        if step not in wanted:
            try:
                remove(path)
            except CannotWrite as error:
                logger.warning("%s", error.reason)
