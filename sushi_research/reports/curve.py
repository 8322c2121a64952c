"""One kind of a run's results at each evaluated step, read from its parquet file and checked against metrics.jsonl."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sushi_research.errors import UserError, some
from sushi_research.evaluation.outcomes import log_ratio
from sushi_research.evaluation.result_arrays import ResultArrays, by_image, refused
from sushi_research.evaluation.results import Results
from sushi_research.reports import training_log
from sushi_research.reports.training_log import TrainingTimes
from sushi_research.runs.run_folder import RESULT_FILES

# Kind of results -> (file in the run folder, key of its mean in metrics.jsonl). Older versions lack all but the first two files.
KINDS = {
    "evaluation": (RESULT_FILES["validation"], "evaluation/loss"),
    "drift": (RESULT_FILES["drift"], "evaluation/drift"),
    "base_images": (RESULT_FILES["base_images"], "evaluation/kept"),
    "prior": (RESULT_FILES["prior"], "evaluation/prior"),
    "trained": (RESULT_FILES["trained"], "evaluation/trained"),
    "pictures_learned": (RESULT_FILES["pictures_learned"], "evaluation/pictures_learned"),
    "pictures_kept": (RESULT_FILES["pictures_kept"], "evaluation/pictures_kept"),
}
# Those whose logged value is the mean of the losses. Of the others it is the mean of log(loss / base's loss), and of
# pictures_kept, whose base is 0, the mean distance.
LOGGED_MEANS = ("evaluation", "drift", "pictures_kept")


@dataclass(frozen=True)
class Curve:
    """Results at T steps on N images (or captions) with K noise samples: `loss` [T, N, K], the base's loss `base` [N, K].

    An image with several captions is one image: its losses are averaged over them. `samples` [T] are the samples seen up to each
    step, None for an adapter file; `times` are the training times.
    """

    set_hash: str
    names: tuple[str, ...]
    timesteps: np.ndarray
    steps: tuple[int, ...]
    loss: np.ndarray
    base: np.ndarray
    samples: np.ndarray | None = None
    times: TrainingTimes = TrainingTimes()  # noqa: RUF009

    @property
    def seconds(self) -> np.ndarray | None:
        """Seconds of training [T] by the clock `times.clock`."""
        return self.times.seconds

    @property
    def measured_on(self) -> tuple[Any, ...]:
        """What must be equal for losses to be paired: the set, and its images and timesteps in their order."""
        return self.set_hash, self.names, self.timesteps.shape, self.timesteps.tobytes()

    def axis(self, name: str) -> np.ndarray | None:
        """`samples`, `seconds` or `wall_seconds`."""
        return {"samples": self.samples, "seconds": self.seconds, "wall_seconds": self.times.wall_seconds}[name]

    def with_sorted_names(self) -> Curve:
        """The same with sorted names."""
        order = sorted(range(len(self.names)), key=self.names.__getitem__)
        names = tuple(self.names[place] for place in order)
        return replace(
            self, names=names, timesteps=self.timesteps[order], loss=self.loss[:, order], base=self.base[order]
        )


@dataclass(frozen=True)
class Course:
    """What else is known of a run's course: the lines of metrics.jsonl, the last step if it has finished, and the global batch
    size. All are None or empty for an evaluated adapter file (`is_file`)."""

    log: Path
    metrics: Sequence[dict[str, Any]] = ()
    finished_at: int | None = None
    global_batch_size: int | None = None
    is_file: bool = False


def read_curve(path: Path, kind: str, course: Course) -> tuple[Curve | None, list[str]]:
    """(the results in a parquet file, None if there are none or they cannot be used; sentences about them).

    UserError if the file is damaged, or is not what metrics.jsonl tells of.
    """
    logged = KINDS[kind][1]
    results = Results(path)
    found = results.arrays()
    if found is None:
        if any(logged in line for line in course.metrics):
            raise UserError(
                f"{path} has no results, although metrics.jsonl tells of some: restore it; that part is skipped"
            )
        return None, []
    problems = []
    if found.repeated:
        problems.append(f"{path} holds rows several times ({found.repeated} too many): each counts once")
    problems += _compared_with_the_log(path, found, kind, course)
    found = by_image(found)
    samples, times, more = _axes(found.steps, course)
    results_of = found.names, found.timesteps, found.steps, found.loss, found.base
    curve = Curve(results.set_hash() or "", *results_of, samples, times)
    if not_finite := _not_finite(curve, path):
        return None, [*problems, *more, not_finite]
    return curve, problems + more


def _not_finite(curve: Curve, path: Path) -> str:
    """A sentence if a value is not finite: a curve of its earlier steps alone would look too good."""
    if np.isfinite(curve.loss).all() and np.isfinite(curve.base).all():
        return ""
    steps = [step for step, loss in zip(curve.steps, curve.loss, strict=True) if not np.isfinite(loss).all()]
    where = f"at step {some([str(step) for step in steps])}" if steps else "of the base"
    return f"{path} has values that are not finite {where}: it is excluded from the test results"


def _compared_with_the_log(path: Path, found: ResultArrays, kind: str, course: Course) -> list[str]:
    """A sentence for the steps that only one of `path` and metrics.jsonl has.

    UserError if the results of a step are not those that were logged, or are of a step after the end of the run.
    """
    logged = KINDS[kind][1]
    means = {line["step"]: line[logged] for line in course.metrics if logged in line}
    for step, loss in zip(found.steps, found.loss, strict=True):
        mean = means.get(step)
        # The same float32 values; only the order of the sum may differ. Ratios may cancel out.
        if isinstance(mean, float) and np.isfinite(loss).all():
            values, floor = (loss, 1e-12) if kind in LOGGED_MEANS else (log_ratio(loss, found.base), 1e-9)
            if not np.isclose(values.mean(dtype=np.float64), mean, rtol=1e-6, atol=floor):
                raise refused(path, f"does not have the results of step {step} that metrics.jsonl tells of")
    said, last = [], found.steps[-1]
    if course.finished_at is not None and last > course.finished_at:
        raise refused(path, f"has results of step {last}, but the run finished at step {course.finished_at}")
    if course.finished_at is not None and last < course.finished_at and not means:
        said.append(f"{path} ends at step {last}, but the run finished at step {course.finished_at}")
    if missing := sorted(means.keys() - set(found.steps)):
        steps = ", ".join(map(str, missing[:5]))
        said.append(f"{path} has no results of step {steps}, which metrics.jsonl has: the other steps are used")
    # A run that was killed, or is still going, may not have logged its last results yet.
    trained = training_log.trained(course.metrics)
    logged_until = max((line["step"] for line in trained), default=0) - (course.finished_at is None)
    if means and (more := [step for step in found.steps if step not in means and step <= logged_until]):
        steps = ", ".join(map(str, more[:5]))
        said.append(
            f"{path} has results of step {steps}, which metrics.jsonl does not have: they are used all the same"
        )
    return said


def _axes(steps: Sequence[int], course: Course) -> tuple[np.ndarray | None, TrainingTimes, list[str]]:
    """(samples seen, training times up to each step, sentences)."""
    if course.is_file or course.global_batch_size is None:
        return None, TrainingTimes(), []
    samples = np.array([step * course.global_batch_size for step in steps], dtype=np.float64)
    if not course.metrics:
        return samples, TrainingTimes(), []
    try:
        times = training_log.training_times(course.log, course.metrics, steps, course.global_batch_size)
    except UserError as error:
        return samples, TrainingTimes(), [str(error)]
    return samples, times, []
