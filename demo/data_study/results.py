"""The recorded runs of the data study and what they were made from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from demo.recorded_runs import keep
from demo.records import ROOT, dependencies
from sushi_research.runs.run_folder import RunFolder

FOLDER = ROOT / "docs/examples/data"
NAMES = ("stamp", "tags")
INPUTS = FOLDER / "inputs.json"
CODE = ("checker", "concepts", "drawing", "held_out", "painter", "data_study/photos", "data_study/scores")


@dataclass(frozen=True)
class Study:
    """One data set with its experiment file. `variants` are in the order of the file, the reference first."""

    name: str
    variants: tuple[str, ...]
    seeds: tuple[int, ...]
    trained: Path

    @property
    def runs(self) -> Path:
        return FOLDER / self.name / "runs"

    def scores(self) -> dict[str, dict[str, np.ndarray]]:
        """Score -> variant -> 1 or 0 for each seed and scene, [seeds, scenes]."""
        found: dict[str, dict[str, list[list[int]]]] = {}
        for variant in self.variants:
            for seed in self.seeds:
                scores = json.loads((self.runs / f"{variant}-seed{seed}/scores.json").read_text())
                for score, content in scores.items():
                    found.setdefault(score, {}).setdefault(variant, []).append(list(content["values"].values()))
        return {score: {name: np.array(rows) for name, rows in of.items()} for score, of in found.items()}

    def p_values(self) -> dict[tuple[str, str], tuple[float, float]]:
        """(score, variant) -> the p-value against the reference, alone and among all tests of the comparison."""
        families = json.loads((FOLDER / self.name / "comparison.json").read_text())["families"]
        return {
            (family.removeprefix("score "), pair["candidate"]): (pair["difference"]["p_value"], pair["adjusted_p"])
            for family, pairs in families.items()
            for pair in pairs
            if family.startswith("score ")
        }

    def keep(self) -> None:
        """Copies the comparison and the records of the trained runs."""
        keep(
            self.trained,
            (f"{variant}-seed{seed}" for variant in self.variants for seed in self.seeds),
            FOLDER / self.name,
        )

    def is_trained(self) -> bool:
        """Whether all runs are finished and compared here."""
        return (self.trained / "comparison/comparison.json").is_file()

    def adapter(self, variant: str) -> Path:
        """The adapter of a variant's first seed, where it was trained."""
        return RunFolder(self.trained / f"{variant}-seed{self.seeds[0]}", None).adapter


def studies() -> dict[str, Study]:
    """The studies by name, as their experiment files describe them."""
    found = {}
    for name in NAMES:
        content = yaml.safe_load((ROOT / f"configs/experiments/{name}.yaml").read_text())
        found[name] = Study(name, tuple(content["variants"]), tuple(content["seeds"]), ROOT / content["folder"])
    return found


def inputs() -> list[Path]:
    """The files that the results depend on; the training code, which has its own tests, is not among them."""
    found = [ROOT / f"demo/{name}.py" for name in CODE] + [ROOT / "configs/demo_sd15.yaml"]
    found += [ROOT / f"configs/experiments/{name}.yaml" for name in NAMES]
    folders = ("base/sd15", "data_study/photos", "held_out/star", "held_out/prior")
    found += [
        path
        for each in folders
        for path in (ROOT / "demo" / each).rglob("*")
        if path.is_file() and path.suffix != ".md"
    ]
    return sorted(found)


def write_inputs() -> None:
    """Records what the results were made from."""
    INPUTS.write_text(json.dumps(dependencies(inputs()), indent=2, sort_keys=True) + "\n")
