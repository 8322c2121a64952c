"""The progress of the training loop: besides steps and time, the epoch, the smoothed loss and of which step the last samples are.

The file of the samples does not fit into a bar of 80 or 120 columns: it is told once, in a line above the bar.
"""

from __future__ import annotations

from pathlib import Path

from tqdm import tqdm

from sushi_research.errors import printable
from sushi_research.progress import progress
from sushi_research.runs.job import Job
from sushi_research.sampling import sample_grids
from sushi_research.training.run_plan import Plan

# The weight of each earlier step in the shown loss: about the last 50 steps count. The loss of one step depends on its timesteps.
SMOOTHING = 0.98


class TrainingBar:
    """The bar of a run that goes on at `step`. Only the main process shows it."""

    def __init__(self, job: Job, plan: Plan, step: int) -> None:
        assert job.run is not None
        self._plan = plan
        self._samples = job.run.samples if job.config.sample.enabled else None
        self._grid: tuple[int, Path] | None = None
        self._sum, self._weight = 0.0, 0.0
        self._bar = progress(
            total=plan.steps, initial=step, description="training", unit="step", disable=not job.is_main
        )

    def unpause(self) -> None:
        """What came before the first step does not count in the rate."""
        self._bar.unpause()

    def update(self, step: int, loss: float) -> None:
        """Counts the step that led to `step`, with its loss."""
        if self._bar.disable:
            return
        if self._samples and (self._grid is None or self._plan.due.sample.at(step - 1)):
            self._look(self._samples)
        self._bar.set_postfix_str(self._text(step, loss), refresh=False)
        self._bar.update()

    def close(self) -> None:
        self._bar.close()

    def _look(self, samples: Path) -> None:
        """Tells where the latest samples are, if they are new."""
        found = sample_grids.latest_grid(samples)
        if found and found != self._grid:
            tqdm.write(printable(f"samples of step {found[0]}: {found[1]}"))
        self._grid = found

    def _text(self, step: int, loss: float) -> str:
        # An average over all steps so far whose weights fall by SMOOTHING per step; divided by their sum, it is not pulled to 0.
        self._sum = SMOOTHING * self._sum + (1 - SMOOTHING) * loss
        self._weight = SMOOTHING * self._weight + (1 - SMOOTHING)
        epoch = step * self._plan.global_batch_size / self._plan.items_per_epoch
        # What matters most comes first: a terminal of 80 columns cuts the rest off.
        parts = [f"loss {self._sum / self._weight:.4f}", f"epoch {epoch:.1f}/{self._plan.epochs:.1f}"]
        return ", ".join([*parts, *([f"samples of step {self._grid[0]}"] if self._grid else [])])
