"""Reads a run folder, or the folder of an evaluated adapter file, for comparisons. Each damaged or missing file becomes a warning,
and the rest is used. Nothing is written; torch is not imported."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sushi_research.errors import UserError
from sushi_research.reports import training_log
from sushi_research.reports.curve import KINDS, Course, Curve, read_curve
from sushi_research.reports.older_versions import settings_in_this_version
from sushi_research.reports.scores import Score, scores_of_run
from sushi_research.runs import provenance, records
from sushi_research.runs.folder_lock import is_locked
from sushi_research.runs.identity import flatten
from sushi_research.runs.run_folder import format_problem

# What a sentence about a damaged file ends with.
SKIPPED = "restore it; that part is skipped"


@dataclass
class RunRecord:
    """One run. `state`: "finished", "still going", "stopped", "unknown" (damaged), or "file" for an evaluated adapter file.

    `finished_at` is the last step of a finished run, else None. `settings` is the flattened config; `identity` is everything that
    determines the result; `entry` describes the last start. `curves` are its results by kind (`curve.KINDS`), without those that
    were not measured.
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
    curves: dict[str, Curve] = field(default_factory=dict)
    scores: dict[str, Score] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def evaluation(self) -> Curve | None:
        """The losses on the held-out images."""
        return self.curves.get("evaluation")

    @property
    def drift(self) -> Curve | None:
        return self.curves.get("drift")

    @property
    def entry(self) -> dict[str, Any]:
        return self.entries[-1] if self.entries else {}

    @property
    def global_batch_size(self) -> int | None:
        """Samples seen at an optimizer step; None if that is not recorded."""
        return self.plan.get("global_batch_size") or self.identity.get("facts.global_batch_size")

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
        """The same with all results sorted by image and caption, so that runs pair whatever the order of rows in their files."""
        return replace(self, curves={kind: curve.with_sorted_names() for kind, curve in self.curves.items()})


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
    course = _course(run)
    for kind, (name, _) in KINDS.items():
        known_problems = len(run.problems)
        curve, said = attempt(lambda name=name, kind=kind: read_curve(path / name, kind, course), (None, []))
        if curve is not None:
            run.curves[kind] = curve
        elif kind == "evaluation" and not said and len(run.problems) == known_problems:
            run.problems.append(
                f"{path} has no evaluation: train with --evaluation.held_out or --evaluation.path, or evaluate its adapter with "
                "scripts/evaluate.py"
            )
        # What is said of the training times is said once, although each kind of results has them.
        run.problems += [problem for problem in said if problem not in run.problems]
    run.scores = attempt(lambda: scores_of_run(path, run.finished_at, SKIPPED), {})
    if run.state == "still going":
        run.problems.append(f"{path} is still going, at step {run.last_step}: its results so far are used")
    elif run.state == "stopped":
        run.problems.append(f"{path} was stopped at step {run.last_step}: its results so far are used")
    return run


def _course(run: RunRecord) -> Course:
    """What the files of results must agree with."""
    log = run.path / "metrics.jsonl"
    if run.state == "file":
        return Course(log, is_file=True)
    return Course(log, run.metrics, run.finished_at, run.global_batch_size)
