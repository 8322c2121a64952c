"""How fast this machine trained before, and with how much memory: from the records of runs with the same settings."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sushi_research.config.renamed_keys import with_new_names
from sushi_research.errors import UserError
from sushi_research.runs import provenance, records
from sushi_research.runs.identity import flatten
from sushi_research.user_files import open_regular, parse_json

# The settings that decide how long an image takes and how much memory it needs. Those of the base and of lora.targets are in the
# number of trained parameters too, so that a tiny base of the same architecture does not count.
SETTINGS = (
    *(
        "lora.kind",
        "lora.targets",
        "lora.rank",
        "lora.dropout",
        "lora.rank_dropout",
        "lora.module_dropout",
        "optimizer.name",
    ),
    *("train.gradient_checkpointing", "train.attention", "train.deterministic", "model.base_storage"),
    "text_encoders.train",
)
# What a run did that was made before there was the setting.
BEFORE = {
    "text_encoders.train": False,
    "model.base_storage": "compute",
    "lora.kind": "lora",
    "lora.rank_dropout": 0.0,
    "lora.module_dropout": 0.0,
}
# The newest runs that are looked at, the steps of a run that its speed is the median of, and the fewest that are enough.
MOST_RUNS, MOST_STEPS, LEAST_STEPS = 50, 200, 3
_LINE_BYTES = 1000  # more than a line of metrics.jsonl has
_REMEDY = "its speed is not used"


@dataclass(frozen=True)
class Measured:
    """What the steps of `run` took: seconds by the wall clock per image, and the peak memory in GiB (of the GPU, or of the
    process)."""

    run: str
    steps: int
    seconds_per_image: float
    peak_memory_gib: float


def conditions(plan: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the speed of a run, from its plan.json and an entry of its provenance.json."""
    machine, split = _mapping(entry.get("machine")), _mapping(plan.get("split"))
    settings = with_new_names(flatten(entry.get("resolved_config") or {}))
    return {
        "architecture": plan.get("architecture"),
        "parameters": plan.get("trainable_parameters"),
        "batch_size": split.get("batch_size"),
        "processes": split.get("processes"),
        "precision": entry.get("precision"),
        "step_path": provenance.step_path(entry),
        "device": entry.get("device"),
        "threads": machine.get("threads") if machine.get("gpu_memory_gib") is None else None,
        "new_tokens": bool(settings.get("text_encoders.new_tokens")),  # their vectors are among the parameters
        "images": _of_images(_mapping(_mapping(entry.get("resolved_config")).get("data"))),
        **{key: settings.get(key, BEFORE.get(key)) for key in SETTINGS},
    }


def _of_images(data: Mapping[str, Any]) -> list[Any]:
    """The resolutions of the sets, and whether each needs a prediction of the base too."""
    plain = data.get("resolutions") or [data.get("resolution")]
    sets = data.get("sets") or [{}]
    return [[each.get("resolutions") or plain, each.get("target") == "base"] for each in map(_mapping, sets)]


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def find(folder: Path, wanted: Mapping[str, Any]) -> Measured | None:
    """The speed of the newest run in `folder`, going on or ended, whose last launch had the `wanted` conditions; None without one.

    A run that cannot be read does not count: this is an estimate, and compare_runs.py reports such a run.
    """
    for path in _newest(folder):
        try:
            plan = records.read_as(path / "plan.json", records.Plan, _REMEDY)
            if plan.get("architecture") != wanted["architecture"]:
                continue
            entry = provenance.entries(path / "provenance.json", _REMEDY)[-1]
            if conditions(plan, entry) != wanted:
                continue
            found = of_launch(path, entry)
        except (UserError, OSError, IndexError):
            continue
        if found is not None:
            return found
    return None


def of_launch(path: Path, entry: Mapping[str, Any]) -> Measured | None:
    """What the last steps of the launch with this entry in provenance.json took; None if they are too few.

    Raises UserError or OSError if the metrics of the run cannot be read.
    """
    lines = _last_lines(path / "metrics.jsonl", entry.get("step") or 0)
    if len(lines) < LEAST_STEPS:
        return None
    seconds = 1 / statistics.median(line["images_per_second"] for line in lines)
    return Measured(str(path), len(lines), seconds, max(line["peak_memory_gib"] for line in lines))


def _newest(folder: Path) -> Sequence[Path]:
    """The run folders in `folder` that have metrics, those written last first."""
    found = []
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    for name in names:
        try:
            found.append((os.stat(folder / name / "metrics.jsonl").st_mtime, folder / name))
        except OSError:
            continue
    return [path for _, path in sorted(found, reverse=True)[:MOST_RUNS]]


def _last_lines(path: Path, after: int) -> list[dict[str, Any]]:
    """The last lines of steps after step `after` with a speed and a peak memory. The file of a long run is not read as a whole."""
    with open_regular(path) as file:
        size = file.seek(0, os.SEEK_END)
        start = max(0, size - MOST_STEPS * _LINE_BYTES)
        file.seek(start)
        parts = file.read().split(b"\n")
    # The first part may be the end of a line, the last one a line that is being written.
    whole = parts[1 if start else 0 : -1]
    found = [parse_json(line, str(path)) for line in whole[-MOST_STEPS:]]
    keys = ("step", "images_per_second", "peak_memory_gib")
    return [
        line
        for line in found
        if records.problem_of(line, records.LINE) is None
        and all(line.get(key) is not None for key in keys)
        and line["step"] > after
    ]
