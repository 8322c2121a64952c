"""Writes a run's page, curves and stage timings: while it trains, at a stop and at its end. None of it stops a training."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from sushi_research.caches.inputs import Inputs
from sushi_research.errors import UserError
from sushi_research.files import write_json
from sushi_research.reports import run_page, thumbnails
from sushi_research.runs import tracking
from sushi_research.runs.job import Job
from sushi_research.sampling import plots
from sushi_research.training.run_plan import Plan

logger = logging.getLogger(__name__)


def write(job: Job, inputs: Inputs, plan: Plan, step: int) -> None:
    """Writes report.html, loss.png and stage_timings.json of a run that goes on. What cannot be written is a warning."""
    with job.main_process_writes():
        if job.is_main:
            assert job.run is not None
            job.timings.enter("saving")
            with optional(f"the run goes on without a page of step {step}"):
                thumbnails.write(job.run, inputs.data.items, inputs.data.sets)
                write_timings(job)
                run_page.write(job.run, f"at step {step} of {plan.steps}")


def write_last(job: Job, step: int, state: str) -> None:
    """Writes the page, the curves and the stage timings at the end of a launch, and sends page and curves to the trackers. What
    cannot be written is a warning.

    `state` is where the run is: "finished at step 500". The trackers get the page without the training images, which the user may
    not want to upload.
    """
    run = job.run
    assert run is not None
    with optional("the run is without its page or its curves, and the same command again makes them"):
        write_timings(job)
        page = run_page.write(run, state)
        best = {"best_step": page.best.step} if page.best else {}
        tracking.log_page(job.accelerator, page.html(training_images=False), best, step)
        if run.curves.exists():
            tracking.log_images(job.accelerator, "curves", [run.curves], [run.name], step)


def write_timings(job: Job) -> None:
    """Writes the seconds of each stage of this launch so far."""
    assert job.run is not None
    write_json(job.run.stage_timings, {name: round(value, 2) for name, value in job.timings.seconds().items()})


@contextlib.contextmanager
def optional(consequence: str) -> Iterator[None]:
    """`plots.optional`, in which an error of the page's own code is a warning too. Other UserErrors, such as that of a run folder
    that is another one now, end the run."""
    with plots.optional(consequence):
        try:
            yield
        except (OSError, UserError):
            raise
        except Exception as error:
            logger.warning("the page cannot be made (%s: %s): %s", type(error).__name__, error, consequence)
