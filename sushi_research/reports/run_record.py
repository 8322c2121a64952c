"""Reads a run folder, or the folder of an evaluated adapter file, for comparisons. Each damaged or missing file becomes a warning,
and the rest is used. Nothing is written; torch is not imported."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from sushi_research.errors import UserError, some
from sushi_research.evaluation.result_arrays import ResultArrays, image_of, refused
from sushi_research.evaluation.results import Results
from sushi_research.reports import training_log
from sushi_research.reports.older_versions import settings_in_this_version
from sushi_research.reports.training_log import TrainingTimes
from sushi_research.runs import provenance, records
from sushi_research.runs.folder_lock import is_locked
from sushi_research.runs.identity import flatten
from sushi_research.runs.run_folder import format_problem

# What a sentence about a damaged file ends with.
SKIPPED = "restore it; that part is skipped"


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


@dataclass
class RunRecord:
    """One run. `state`: "finished", "still going", "stopped", "unknown" (damaged), or "file" for an evaluated adapter file.

    `finished_at` is the last step of a finished run, else None. `settings` is the flattened config; `identity` is everything that
    determines the result; `entry` describes the last start.
    """

    path: Path
    name: str
    state: str
    finished_at: int | None = None
    identity: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)
    entries: list[dict[str, Any]] = field(default_factory=list)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    stage_timings: dict[str, float] = field(default_factory=dict)
    evaluation: Curve | None = None
    drift: Curve | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def entry(self) -> dict[str, Any]:
        return self.entries[-1] if self.entries else {}

    @property
    def launches(self) -> list[dict[str, Any]]:
        """The entries of the launches that trained a step of the run as it is. One that only wrote a lost adapter file again, or
        was stopped before its first step, is not among them."""
        trained = self.trained
        step = self.finished_at or (trained[-1]["step"] if trained else None)
        return provenance.launches(self.entries, step)

    @property
    def seed(self) -> int | None:
        return self.identity.get("train.seed")

    @property
    def trained(self) -> list[dict[str, Any]]:
        """The lines of `metrics` written by optimizer steps."""
        return training_log.trained(self.metrics)

    @property
    def last_step(self) -> int:
        of_evaluation = self.evaluation.steps[-1:] if self.evaluation else ()
        return max((*(record["step"] for record in self.metrics), *of_evaluation), default=0)

    def with_sorted_names(self) -> RunRecord:
        """The same with both results sorted by image and caption, so that runs pair whatever the order of rows in their files."""
        evaluation, drift = (curve and curve.with_sorted_names() for curve in (self.evaluation, self.drift))
        return replace(self, evaluation=evaluation, drift=drift)


def is_record(folder: Path) -> bool:
    """Whether a folder is a run folder or the folder of an evaluated adapter file."""
    return os.path.lexists(folder / "run.json") or (
        os.path.lexists(folder / "provenance.json") and os.path.lexists(folder / "evaluation.parquet")
    )


def find_records(path: Path) -> list[Path]:
    """The run folder `path`, or all run folders in it; UserError if there is none."""
    if is_record(path):
        return [path]
    found = sorted(folder for folder in path.iterdir() if is_record(folder)) if path.is_dir() else []
    if not found:
        what = "holds no run" if path.is_dir() else "is not a folder"
        raise UserError(
            f"{path} {what} (a run's folder has a run.json): give the folder of a run, or one that holds runs."
        )
    return found


def read_record(path: Path) -> RunRecord:
    """Reads all readable parts of a run; each problem becomes a sentence in `problems`."""
    run = RunRecord(path, path.resolve().name, "file")

    def attempt(what: Callable[[], Any], otherwise: Any) -> Any:
        try:
            return what()
        except UserError as error:
            run.problems.append(str(error))
        except (OSError, KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            run.problems.append(f"{path}: {type(error).__name__} while reading it ({error}); that part is skipped")
        return otherwise

    run.entries = attempt(lambda: provenance.entries(path / "provenance.json", SKIPPED), [])
    if os.path.lexists(path / "run.json"):
        content = attempt(lambda: records.read_json(path / "run.json", SKIPPED), ...)
        if problem := format_problem(path / "run.json", content):
            run.state, run.problems = "unknown", [f"{problem}; it is skipped"]
            return run
        record = None
        if content is not ...:
            record = attempt(lambda: records.fitting(content, records.RunRecord, str(path / "run.json"), SKIPPED), None)
        run.identity = record["identity"] if record else {}
        # If run.json cannot be read, it is not known whether the run has finished.
        run.state = ("finished" if record["finished_at"] is not None else "stopped") if record else "unknown"
        if is_locked(path):
            run.state = "still going"
        run.plan = attempt(lambda: records.read_as(path / "plan.json", records.Plan, SKIPPED), {})
        if os.path.lexists(path / "stage_timings.json"):
            run.stage_timings = attempt(
                lambda: records.read_as(path / "stage_timings.json", records.TIMINGS, SKIPPED), {}
            )
        run.finished_at = record["finished_at"] if record and run.state == "finished" else None
        run.metrics = attempt(lambda: training_log.read_log(path / "metrics.jsonl", run.finished_at), [])
        run.problems += training_log.notes_on_gaps(path / "metrics.jsonl", run.metrics)
    if os.path.lexists(path / "config.yaml"):
        run.settings = attempt(lambda: flatten(records.read_config(path / "config.yaml", SKIPPED)), {})
    elif run.entry:
        run.settings = flatten(run.entry.get("resolved_config") or {})
    if run.identity:
        as_read = (run.identity, run.settings)
        complete = attempt(lambda: settings_in_this_version(*as_read, run.plan.get("architecture")), as_read)
        run.identity, run.settings = complete
    known_problems = len(run.problems)
    run.evaluation = attempt(lambda: _curve(run, path / "evaluation.parquet", "evaluation/loss"), None)
    is_damaged = len(run.problems) > known_problems
    run.drift = attempt(lambda: _curve(run, path / "drift.parquet", "evaluation/drift"), None)
    if run.evaluation is None and not is_damaged:
        run.problems.append(
            f"{path} has no evaluation: train with --evaluation.held_out or --evaluation.path, or evaluate its adapter with "
            "scripts/evaluate.py"
        )
    run.evaluation = _finite(run, run.evaluation, path / "evaluation.parquet")
    run.drift = _finite(run, run.drift, path / "drift.parquet")
    if run.state == "still going":
        run.problems.append(f"{path} is still going, at step {run.last_step}: its results so far are used")
    elif run.state == "stopped":
        run.problems.append(f"{path} was stopped at step {run.last_step}: its results so far are used")
    return run


def _curve(run: RunRecord, path: Path, logged: str) -> Curve | None:
    """The results in a parquet file as arrays; None if there are none. `logged` is the key of their mean in metrics.jsonl."""
    results = Results(path)
    found = results.arrays()
    if found is None:
        if any(logged in line for line in run.metrics):
            raise UserError(
                f"{path} has no results, although metrics.jsonl tells of some: restore it; that part is skipped"
            )
        return None
    if found.repeated:
        run.problems.append(f"{path} holds rows several times ({found.repeated} too many): each counts once")
    run.problems += _compared_with_the_log(run, path, found, logged)
    places: dict[str, list[int]] = {}
    for place, name in enumerate(found.names):
        places.setdefault(image_of(name), []).append(place)
    loss, base, times = found.loss, found.base, found.timesteps
    if len(places) < len(found.names):
        loss = np.stack([loss[:, several].mean(1, dtype=np.float64) for several in places.values()], axis=1)
        base = np.stack([base[several].mean(0, dtype=np.float64) for several in places.values()])
        times = np.stack([times[several[0]] for several in places.values()])
    samples, spent = None, TrainingTimes()
    if run.state != "file":
        samples, spent = _axes(run, found.steps)
    return Curve(results.set_hash() or "", tuple(places), times, found.steps, loss, base, samples, spent)


def _finite(run: RunRecord, curve: Curve | None, path: Path) -> Curve | None:
    """The curve, or None with a problem if a value is not finite: a curve of its earlier steps alone would look too good."""
    if curve is None or (np.isfinite(curve.loss).all() and np.isfinite(curve.base).all()):
        return curve
    steps = [step for step, loss in zip(curve.steps, curve.loss, strict=True) if not np.isfinite(loss).all()]
    where = f"at step {some([str(step) for step in steps])}" if steps else "of the base"
    run.problems.append(f"{path} has values that are not finite {where}: it is excluded from the test results")
    return None


def _compared_with_the_log(run: RunRecord, path: Path, found: ResultArrays, logged: str) -> list[str]:
    """A sentence for the steps that only one of `path` and metrics.jsonl has. `logged` is the key of the mean in metrics.jsonl.

    UserError if the results of a step are not those that were logged, or are of a step after the end of the run.
    """
    means = {line["step"]: line[logged] for line in run.metrics if logged in line}
    for step, loss in zip(found.steps, found.loss, strict=True):
        mean = means.get(step)
        # The same float32 values; only the order of the sum may differ.
        if isinstance(mean, float) and np.isfinite(loss).all():
            if not np.isclose(loss.mean(dtype=np.float64), mean, rtol=1e-6, atol=1e-12):
                raise refused(path, f"does not have the results of step {step} that metrics.jsonl tells of")
    said, last = [], found.steps[-1]
    if run.finished_at is not None and last > run.finished_at:
        raise refused(path, f"has results of step {last}, but the run finished at step {run.finished_at}")
    if run.finished_at is not None and last < run.finished_at and not means:
        said.append(f"{path} ends at step {last}, but the run finished at step {run.finished_at}")
    if missing := sorted(means.keys() - set(found.steps)):
        steps = ", ".join(map(str, missing[:5]))
        said.append(f"{path} has no results of step {steps}, which metrics.jsonl has: the other steps are used")
    # A run that was killed, or is still going, may not have logged its last results yet.
    logged_until = max((line["step"] for line in run.trained), default=0) - (run.finished_at is None)
    if means and (more := [step for step in found.steps if step not in means and step <= logged_until]):
        steps = ", ".join(map(str, more[:5]))
        said.append(
            f"{path} has results of step {steps}, which metrics.jsonl does not have: they are used all the same"
        )
    return said


def _axes(run: RunRecord, steps: Sequence[int]) -> tuple[np.ndarray | None, TrainingTimes]:
    """(samples seen, training times) up to each step."""
    global_batch_size = run.plan.get("global_batch_size") or run.identity.get("facts.global_batch_size")
    if global_batch_size is None:
        return None, TrainingTimes()
    samples, times = np.array([step * global_batch_size for step in steps], dtype=np.float64), TrainingTimes()
    if run.metrics:
        try:
            times = training_log.training_times(run.path / "metrics.jsonl", run.metrics, steps, global_batch_size)
        except UserError as error:
            if str(error) not in run.problems:  # evaluation and drift are read alike
                run.problems.append(str(error))
    return samples, times
