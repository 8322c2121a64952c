"""Reads a run folder, or the folder of an evaluated adapter file, for comparisons. Each damaged or missing file becomes a warning,
and the rest is used. Nothing is written; torch is not imported."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sushi_research.config.yaml12 import read_yaml
from sushi_research.errors import UserError
from sushi_research.evaluation.results import Results
from sushi_research.reports.older_versions import settings_in_this_version
from sushi_research.runs import provenance
from sushi_research.runs.folder_lock import is_locked
from sushi_research.runs.identity import flatten
from sushi_research.runs.run_folder import format_problem
from sushi_research.runs.tracking import MetricsFile


@dataclass(frozen=True)
class Curve:
    """Results at T steps on N images (or captions) with K noise samples: `loss` [T, N, K], the base's loss `base` [N, K].

    `samples` and `seconds` [T]: samples seen and training time (without evaluation etc.) up to each step; None for an adapter
    file.
    """

    set_hash: str
    names: tuple[str, ...]
    timesteps: np.ndarray
    steps: tuple[int, ...]
    loss: np.ndarray
    base: np.ndarray
    samples: np.ndarray | None = None
    seconds: np.ndarray | None = None

    def axis(self, name: str) -> np.ndarray | None:
        """`samples` or `seconds`."""
        return {"samples": self.samples, "seconds": self.seconds}[name]


@dataclass
class RunRecord:
    """One run. `state`: "finished", "still going", "stopped", "unknown" (damaged), or "file" for an evaluated adapter file.

    `settings` is the flattened config; `identity` is everything that determines the result; `entry` describes the last start.
    """

    path: Path
    name: str
    state: str
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
    def seed(self) -> int | None:
        return self.identity.get("train.seed")

    @property
    def trained(self) -> list[dict[str, Any]]:
        """The lines of `metrics` written by optimizer steps."""
        return [record for record in self.metrics if "images_per_second" in record]

    @property
    def last_step(self) -> int:
        return max((record["step"] for record in self.metrics), default=0)


def is_record(folder: Path) -> bool:
    """Whether a folder is a run folder or the folder of an evaluated adapter file."""
    return (folder / "run.json").is_file() or (
        (folder / "provenance.json").is_file() and (folder / "evaluation.parquet").is_file()
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

    run.entries = attempt(lambda: _entries(path / "provenance.json"), [])
    if (path / "run.json").is_file():
        record = attempt(lambda: _json(path / "run.json"), {})
        if record and (problem := format_problem(path / "run.json", record)):
            run.state, run.problems = "unknown", [f"{problem}; it is skipped"]
            return run
        run.identity = attempt(lambda: _mapping(path / "run.json", record.get("identity") or {}), {})
        # If run.json cannot be read, it is not known whether the run has finished.
        run.state = ("finished" if record.get("finished_at") is not None else "stopped") if record else "unknown"
        if is_locked(path):
            run.state = "still going"
        run.plan = attempt(lambda: _json(path / "plan.json"), {})
        run.stage_timings = (
            attempt(lambda: _json(path / "stage_timings.json"), {}) if (path / "stage_timings.json").is_file() else {}
        )
        run.metrics = attempt(lambda: _metrics(path / "metrics.jsonl"), [])
    if (path / "config.yaml").is_file():
        run.settings = attempt(lambda: flatten(read_yaml(str(path / "config.yaml"))), {})
    elif run.entry:
        run.settings = flatten(run.entry.get("resolved_config") or {})
    if run.identity:
        as_read = (run.identity, run.settings)
        complete = attempt(lambda: settings_in_this_version(*as_read, run.plan.get("architecture")), as_read)
        run.identity, run.settings = complete
    known_problems = len(run.problems)
    run.evaluation = attempt(lambda: _curve(run, path / "evaluation.parquet"), None)
    is_damaged = len(run.problems) > known_problems
    run.drift = attempt(lambda: _curve(run, path / "drift.parquet"), None)
    if run.evaluation is None and not is_damaged:
        run.problems.append(
            f"{path} has no evaluation: train with --evaluation.held_out or --evaluation.path, or evaluate its adapter with "
            "scripts/evaluate.py"
        )
    elif run.evaluation is not None and not np.isfinite(run.evaluation.loss).all():
        run.problems.append(
            f"{path} has validation losses that are not finite: it diverged and is excluded from the test results"
        )
        run.evaluation = None
    if run.state == "still going":
        run.problems.append(f"{path} is still going, at step {run.last_step}: its results so far are used")
    elif run.state == "stopped":
        run.problems.append(f"{path} was stopped at step {run.last_step}: its results so far are used")
    return run


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: that part is skipped") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): restore it; that part is skipped") from None
    return _mapping(path, found)


def _mapping(path: Path, found: Any) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise UserError(f"{path} does not hold what a run writes: restore it; that part is skipped")
    return found


def _entries(path: Path) -> list[dict[str, Any]]:
    """The entries of provenance.json, one per start. Checks that their parts are mappings, which later code relies on."""
    found = provenance.entries(path)
    for entry in found:
        for part in ("code", "base", "libraries", "resolved_config"):
            _mapping(path, entry.get(part) or {})
    return found


def _metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; UserError if one has no step, or a speed that is not positive."""
    found = MetricsFile(path).read()
    for number, line in enumerate(found, 1):
        speed = line.get("images_per_second", 1.0) if isinstance(line, dict) else None
        if not (_is_number(speed) and speed > 0 and _is_number(line.get("step"))):
            raise UserError(f"{path}, line {number} does not hold what a run writes: remove it; the file is skipped")
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _curve(run: RunRecord, path: Path) -> Curve | None:
    """The results in a parquet file as arrays; None if there are none."""
    table = Results(path).read()
    if table is None or table.num_rows == 0:
        return None
    steps, noise_samples = table["step"].to_numpy(), int(table["noise_sample"].to_numpy().max()) + 1
    distinct = sorted(set(steps.tolist()))
    rows = table.num_rows // len(distinct)
    images = table["image"].to_pylist()
    names = tuple(images[:rows:noise_samples])
    complete = [(steps == step).sum() == rows == len(names) * noise_samples for step in distinct]
    if not all(complete) or images != [name for name in names for _ in range(noise_samples)] * len(distinct):
        raise UserError(
            f"{path} does not have the same images and noise samples at every step: restore it; it is skipped"
        )
    shape = (len(distinct), len(names), noise_samples)
    loss, base, times = (table[name].to_numpy().reshape(shape) for name in ("loss", "base_loss", "timestep"))
    samples = seconds = None
    if run.state != "file":
        samples, seconds = _axes(run, distinct)
    set_hash = table.schema.metadata[b"set_hash"].decode()
    return Curve(set_hash, names, times[0], tuple(distinct), loss, base[0], samples, seconds)


def _axes(run: RunRecord, steps: list[int]) -> tuple[np.ndarray | None, np.ndarray | None]:
    """(samples seen, training seconds) up to each step, from the logged speeds; excludes evaluating, sampling and saving."""
    global_batch_size = run.plan.get("global_batch_size") or run.identity.get("facts.global_batch_size")
    if global_batch_size is None:
        return None, None
    samples = np.array([step * global_batch_size for step in steps], dtype=np.float64)
    at = np.array([record["step"] for record in run.trained])
    spent = np.cumsum([global_batch_size / record["images_per_second"] for record in run.trained])
    if not len(at) or steps[-1] > at[-1]:
        return samples, None
    return samples, np.array([spent[at <= step][-1] if step else 0.0 for step in steps])
