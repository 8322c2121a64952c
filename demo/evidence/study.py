"""An experiment of configs/experiments and the records of its runs in docs/examples."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean, median
from typing import Any

import yaml

from demo.evidence.compared import checked_variants, comparison_of
from demo.evidence.endings import (
    DIVERGED,
    FINISHED,
    LAUNCH,
    MISSING,
    UNFINISHED,
    ending,
    is_finite,
    launch_of,
    lines_of,
    reason,
    require_ended,
)
from demo.recorded_runs import keep
from demo.records import ROOT
from sushi_research.experiments.comparison import Comparison
from sushi_research.reports.run_record import read_record

# (variant, the variant it is compared with) besides the pairs with the reference, in the same family of tests. They were named
# before any run of these experiments had been looked at.
FURTHER_PAIRS = {
    "night": (("zero_snr_min_snr", "zero_snr"),),
    "ema": (("cosine_ema_097", "cosine"),),
}


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

    def run(self, name: str) -> Path:
        """The folder of a recorded run."""
        return self.folder / "runs" / name

    def records(self) -> list[Path]:
        """The folders of the recorded runs, by variant and seed."""
        return [self.run(name) for variant in self.variants for name in self.names(variant)]

    @cached_property
    def endings(self) -> dict[str, str]:
        """How each recorded run ended, by its name."""
        return {run.name: ending(run, run / LAUNCH) for run in self.records()}

    def is_recorded(self) -> bool:
        """Whether all runs are recorded, each finished or diverged."""
        return not {MISSING, UNFINISHED} & set(self.endings.values())

    def is_trained(self) -> bool:
        """Whether runs are compared here, where they were trained."""
        return (self.trained / "comparison/comparison.json").is_file()

    def keep(self) -> None:
        """Copies the comparison and the records of the trained runs, and of those that diverged why they ended.

        UserError, before anything is copied, if a run has neither finished nor diverged, or has other code than the others.
        """
        names = [path.name for path in self.records()]
        found = {name: require_ended(self.trained / name, launch_of(self.trained, name), self.name) for name in names}
        diverged = [name for name, how in found.items() if how == DIVERGED]
        finished = {v: [self.trained / n for n in self.names(v) if n not in diverged] for v in self.variants}
        checked_variants({variant: list(map(read_record, runs)) for variant, runs in finished.items() if runs})
        keep(self.trained, names, self.folder, diverged)
        for name in diverged:
            if launch_of(self.trained, name).is_file():
                shutil.copyfile(launch_of(self.trained, name), self.run(name) / LAUNCH)
        self.__dict__.pop("endings", None)

    def diverged(self, variant: str) -> dict[str, str]:
        """The runs of a variant that diverged, with what is known of why."""
        return {
            name: reason(self.run(name) / LAUNCH) or "its last validation loss is not finite"
            for name in self.names(variant)
            if self.endings[name] == DIVERGED
        }

    def said_of_diverged(self, variant: str) -> str:
        """ "diverged in 1 of 3 seeds"; "" if no run of the variant did."""
        count, of = len(self.diverged(variant)), len(self.names(variant))
        return f"diverged in {count} of {of} seeds" if count else ""

    @cached_property
    def comparison(self) -> Comparison:
        """The recorded runs compared by the present statistics, each variant with the reference, and the further pairs.

        A variant of which a run diverged is left out: the seeds that are left are chosen by their result. UserError if the runs
        were not trained with one code, or those of a variant not with one config.
        """
        compared = [variant for variant in self.variants if not self.diverged(variant)]
        runs = {variant: [read_record(self.run(name)) for name in self.names(variant)] for variant in compared}
        pairs = [(variant, self.reference) for variant in self.variants[1:]] + list(FURTHER_PAIRS.get(self.name, ()))
        return comparison_of(runs, [pair for pair in pairs if set(pair) <= set(compared)])

    def last(self, variant: str, key: str) -> float | None:
        """The mean over the seeds of a value of the last evaluation; None if a run does not have it, or diverged."""
        found = [
            next((line[key] for line in reversed(lines_of(self.run(name))) if key in line), None)
            if self.endings[name] == FINISHED
            else None
            for name in self.names(variant)
        ]
        return mean(found) if all(map(is_finite, found)) else None

    def seconds(self, variant: str) -> float | None:
        """The median CPU seconds of a step, of all seeds together; None if no step is recorded."""
        found = [
            line["cpu_seconds"]
            for name in self.names(variant)
            for line in lines_of(self.run(name))
            if "cpu_seconds" in line
        ]
        return median(found) if found else None

    @cached_property
    def score_names(self) -> list[str]:
        """The names of all scores, in the order in which they are recorded."""
        return list(dict.fromkeys(name for run in self.records() for name in _scores(run)))

    def scores(self, variant: str) -> dict[str, list[float | None]]:
        """The mean of each score over its units, for each seed; None of a run without that score."""
        of_runs = [_scores(self.run(name)) for name in self.names(variant)]
        return {name: [each.get(name) for each in of_runs] for name in self.score_names}


def _scores(run: Path) -> dict[str, float]:
    path = run / "scores.json"
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {name: mean(score["values"].values()) for name, score in content.items()}
