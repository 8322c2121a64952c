"""Reads what a run recorded at its evaluations, for its page and for the choice of a step. It writes nothing and needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from sushi_research.errors import UserError
from sushi_research.evaluation.outcomes import LEARNED_BINS, in_bins, log_ratio
from sushi_research.evaluation.result_arrays import ResultArrays, by_image
from sushi_research.evaluation.results import Results
from sushi_research.reports.best_step import StepOutcomes
from sushi_research.runs.run_folder import RunFolder


@dataclass
class RunOutcomes:
    """The results of a run by their set's name (evaluation/measured_sets.py), those that it has, and sentences about damaged files.

    An image with several captions is one image.
    """

    arrays: dict[str, ResultArrays]
    problems: list[str] = field(default_factory=list)

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps that were evaluated on the held-out images."""
        return self.arrays["validation"].steps if "validation" in self.arrays else ()

    def ratios(self, measured: str, bins: Sequence[int] | None = None) -> np.ndarray | None:
        """Mean log(loss / base's loss) of each unit at `steps`, [T, N], NaN where it was not measured; None if it never was.

        `bins`: over the noise samples of these timestep bins only; None if a bin has none.
        """
        found = self.arrays.get(measured)
        if found is None:
            return None
        values: np.ndarray | None = log_ratio(found.loss, found.base)
        if bins is not None:
            values = in_bins(values, found.timesteps, bins)
        return None if values is None else at_steps(values.mean(-1), found.steps, self.steps)

    def distances(self, measured: str) -> np.ndarray | None:
        """Mean loss of each unit at `steps`, as `ratios`, for what has no base to divide by."""
        found = self.arrays.get(measured)
        return None if found is None else at_steps(found.loss.mean(-1, dtype=np.float64), found.steps, self.steps)

    def of_steps(self) -> StepOutcomes | None:
        """What decides between the steps; None without evaluations, or if a timestep bin that counts has no noise samples."""
        learned = self.ratios("validation", LEARNED_BINS)
        if learned is None:
            return None
        return StepOutcomes(
            self.steps,
            learned,
            kept=self.ratios("base_images"),
            prior=self.ratios("prior"),
            held_out=self.ratios("validation"),
            trained=self.ratios("trained"),
            pictures_learned=self.ratios("pictures_learned"),
            pictures_kept=self.distances("pictures_kept"),
        )


def read(run: RunFolder) -> RunOutcomes:
    """The results of a run. A damaged file becomes a sentence in `problems`, and the rest is read."""
    outcomes = RunOutcomes({})
    for measured, path in run.results.items():
        try:
            found = Results(path).arrays()
        except UserError as error:
            outcomes.problems.append(str(error))
            continue
        if found is not None:
            outcomes.arrays[measured] = by_image(found)
    return outcomes


def at_steps(values: np.ndarray, steps: Sequence[int], wanted: Sequence[int]) -> np.ndarray:
    """Values [T, ...] of `steps` as values of the `wanted` steps; NaN for those that are not among them."""
    places = {step: place for place, step in enumerate(steps)}
    missing = np.full(values.shape[1:], np.nan)
    found = [values[places[step]] if step in places else missing for step in wanted]
    return np.array(found).reshape(
        len(wanted), *values.shape[1:]
    )  # also of no steps, if only the held-out images' file is damaged
