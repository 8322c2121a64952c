"""An experiment of configs/experiments and the records of its runs in docs/examples."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean, median
from typing import Any

import yaml

from demo.recorded_runs import keep
from demo.records import ROOT
from sushi_research.experiments.comparison import Comparison, compare
from sushi_research.reports.run_record import read_record
from sushi_research.runs.run_folder import RunFolder


@dataclass(frozen=True)
class Study:
    """`name` of the file in configs/experiments; `folder` of its records, below docs/examples."""

    name: str
    folder: Path

    @classmethod
    def of(cls, name: str, folder: str | None = None) -> Study:
        return cls(name, ROOT / "docs/examples" / (folder or name))

    @cached_property
    def content(self) -> dict[str, Any]:
        """The experiment file."""
        return yaml.safe_load((ROOT / f"configs/experiments/{self.name}.yaml").read_text(encoding="utf-8"))

    @property
    def trained(self) -> Path:
        return ROOT / self.content["folder"]

    @property
    def reference(self) -> str:
        return self.content["reference"]

    @property
    def variants(self) -> list[str]:
        """The reference first, then the others in the order of the file."""
        return [self.reference, *(name for name in self.content["variants"] if name != self.reference)]

    def names(self, variant: str) -> list[str]:
        return [f"{variant}-seed{seed}" for seed in self.content["seeds"]]

    def records(self) -> list[Path]:
        """The folders of the recorded runs, by variant and seed."""
        return [self.folder / "runs" / name for variant in self.variants for name in self.names(variant)]

    def is_recorded(self) -> bool:
        """Whether all runs are recorded."""
        return all((folder / "run.json").is_file() for folder in self.records())

    def is_trained(self) -> bool:
        """Whether all runs are compared here, where they were trained."""
        return (self.trained / "comparison/comparison.json").is_file()

    def keep(self) -> None:
        """Copies the comparison and the records of the trained runs."""
        keep(self.trained, [path.name for path in self.records()], self.folder)

    @cached_property
    def comparison(self) -> Comparison:
        """The recorded runs compared by the present statistics, each variant with the reference."""
        return compare([read_record(folder) for folder in self.records()], self.reference)

    def lines(self, name: str) -> list[dict[str, Any]]:
        """The lines of a run's metrics.jsonl."""
        text = (self.folder / "runs" / name / "metrics.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    def last(self, variant: str, key: str) -> float | None:
        """The mean over the seeds of a value of the last evaluation; None if a run does not have it."""
        found = [
            next((line[key] for line in reversed(self.lines(name)) if key in line), None)
            for name in self.names(variant)
        ]
        return None if None in found else mean(found)

    def seconds(self, variant: str) -> float:
        """The median CPU seconds of a step, of all seeds together."""
        return median(
            line["cpu_seconds"] for name in self.names(variant) for line in self.lines(name) if "cpu_seconds" in line
        )

    def scores(self, variant: str) -> dict[str, list[float]]:
        """The mean of each score over its units, for each seed."""
        found: dict[str, list[float]] = {}
        for name in self.names(variant):
            content = json.loads((self.folder / "runs" / name / "scores.json").read_text(encoding="utf-8"))
            for score, of_it in content.items():
                found.setdefault(score, []).append(mean(of_it["values"].values()))
        return found

    def adapter(self, variant: str) -> Path:
        """The adapter file of the first seed's run, where it was trained."""
        return RunFolder(self.trained / self.names(variant)[0], None).adapter
