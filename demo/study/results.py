"""The recorded results of the study: for each adapter what was scored right, and each measure for every image or prompt."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from demo.records import dependencies
from demo.study.candidates import KEPT, LEARNED, memorised
from demo.study.recipes import ROOT, SETTINGS, Setting, recipes
from demo.study.train import adapter_path

FOLDER = ROOT / "docs/examples/measure"
# The hashes of what the recorded results were made from.
INPUTS = FOLDER / "inputs.json"
# What decides which adapters there are, how they are scored, and what is measured.
CODE = ("checker", "concepts", "drawing", "held_out", "study/candidates", "study/recipes")
# Significant digits of a recorded value: far below its standard error, and a file stays below 200 kB.
DIGITS = 4


@dataclass(frozen=True)
class Measured:
    """One adapter: how many of 32 pictures were right (by `Setting.nearest`), and the measures' values by image or prompt."""

    recipe: str
    steps: int
    concept: int
    kept: int
    nearest: int
    learned: dict[str, np.ndarray]
    kept_measures: dict[str, np.ndarray]
    memorised: float | None


def inputs() -> list[Path]:
    """The files that the results depend on; the training and measuring code, which has its own tests, is not among them."""
    found = [ROOT / f"demo/{name}.py" for name in CODE]
    found += [ROOT / f"configs/demo_{architecture}.yaml" for architecture in ("sdxl", "sd15")]
    found += [ROOT / f"configs/demo/{setting.concept}.yaml" for setting in SETTINGS]
    bases = sorted({f"base/{setting.architecture}" for setting in SETTINGS})
    for folder in (*bases, "photos", "held_out"):
        found += [path for path in (ROOT / "demo" / folder).rglob("*") if path.is_file() and path.suffix != ".md"]
    return sorted(set(found))


def write_inputs() -> None:
    """Records what the results were made from."""
    INPUTS.write_text(json.dumps(dependencies(inputs()), indent=2, sort_keys=True) + "\n")


def path_of(setting: Setting) -> Path:
    """The recorded results of a setting."""
    return FOLDER / f"{setting.name}.json"


def names(setting: Setting) -> list[str]:
    """The adapters of a setting, as RECIPE-STEPS."""
    return [adapter_path(setting, recipe, steps).stem for recipe in recipes(setting) for steps in setting.steps]


def is_complete(setting: Setting) -> bool:
    """Whether every adapter of the setting is recorded."""
    path = path_of(setting)
    return path.is_file() and set(names(setting)) <= json.loads(path.read_text()).keys()


def record(setting: Setting) -> None:
    """Writes the results of a setting whose adapters are all scored and measured."""
    base = dict(np.load(setting.folder / "measures/base.npz"))
    found: dict[str, Any] = {}
    for name in names(setting):
        scores = json.loads((setting.folder / f"scores/{name}.json").read_text())
        arrays = dict(np.load(setting.folder / f"measures/{name}.npz"))
        found[name] = {
            "concept": "".join("x" if right else "." for right in scores["concept"]),
            "kept": "".join("x" if right else "." for right in scores["kept"]),
            "concept_nearest": sum(scores["concept_nearest"]),
            "learned": {key: _rounded(measure(arrays, base)) for key, measure in LEARNED.items()},
            "kept_measures": {key: _rounded(measure(arrays, base)) for key, measure in KEPT.items()},
            # Of the photos, a run on few of them was trained on those alone.
            "memorised": None if name.startswith("few-") else round(memorised(arrays), DIGITS),
        }
    FOLDER.mkdir(parents=True, exist_ok=True)
    lines = [f"{json.dumps(name)}: {json.dumps(value, separators=(',', ':'))}" for name, value in found.items()]
    path_of(setting).write_text("{\n" + ",\n".join(lines) + "\n}\n")


def read(setting: Setting) -> list[Measured]:
    """The recorded adapters of a setting, in the order of the file."""
    found = []
    for name, entry in json.loads(path_of(setting).read_text()).items():
        recipe, _, steps = name.rpartition("-")
        found.append(
            Measured(
                recipe=recipe,
                steps=int(steps),
                concept=entry["concept_nearest"] if setting.nearest else entry["concept"].count("x"),
                kept=entry["kept"].count("x"),
                nearest=entry["concept_nearest"],
                learned={key: np.array(values) for key, values in entry["learned"].items()},
                kept_measures={key: np.array(values) for key, values in entry["kept_measures"].items()},
                memorised=entry["memorised"],
            )
        )
    return found


def recorded() -> dict[str, list[Measured]]:
    """The recorded settings by name."""
    return {setting.name: read(setting) for setting in SETTINGS if path_of(setting).is_file()}


def _rounded(values: np.ndarray) -> list[float]:
    return [float(f"{value:.{DIGITS}g}") for value in values]
