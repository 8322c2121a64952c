"""The command `python -m demo.measure RUN`: scores the pictures of a run's adapter into RUN/scores.json.

Of every prompt it says whether the checker finds exactly what was asked (1) or not (0): "concept" has unseen prompts of what the
run learned, "kept" prompts of the base's world. `python -m demo.night RUN` adds how bright the pictures of the concept are. A run
that is evaluated with the average of its weights (`ema.evaluate`) is scored with that file.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from PIL import Image

from demo.checker import Checker
from demo.concepts import CONCEPTS, Concept, known_scenes
from demo.drawing import Scene
from demo.painter import load_pipeline, paint
from sushi_research.config.process import begin, run_main
from sushi_research.errors import UserError
from sushi_research.files import write_json
from sushi_research.progress import progress
from sushi_research.reports.scores import read_scores
from sushi_research.runs import records
from sushi_research.runs.run_folder import RunFolder
from sushi_research.training.run import quiet_libraries


@dataclass(frozen=True)
class Measure:
    """A number of a picture of the concept, by its scene."""

    of: Callable[[Image.Image, Scene], float]
    better: str


def main(
    arguments: Sequence[str],
    prompts: tuple[int, int],
    checker_of: Callable[[Concept], Checker],
    measures: Mapping[str, Measure] = MappingProxyType({}),
) -> None:
    """Scores a run, unless its scores are newer than its adapter. `prompts` are how many of the concept and of the base's world.

    `measures`: further scores of the pictures of the concept, by name.
    """
    parser = argparse.ArgumentParser("python -m demo.measure", description="Score the pictures of a run's adapter.")
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a finished run on a base of demo/base")
    parser.add_argument("--concept", choices=CONCEPTS, help="what the run learned, if its data is not demo/photos/NAME")
    given = parser.parse_args(arguments)
    begin()
    run_main(lambda each: score_run(each.run, each.concept, prompts, checker_of, measures), given)


def score_run(
    run: Path,
    concept_name: str | None,
    prompts: tuple[int, int],
    checker_of: Callable[[Concept], Checker],
    measures: Mapping[str, Measure] = MappingProxyType({}),
) -> None:
    """Writes RUN/scores.json. UserError for what is no finished run of the demo."""
    config, folder = config_of(run), RunFolder(run, None)
    concept = concept_of(run, config) if concept_name is None else CONCEPTS[concept_name]
    base = Path(config["model"]["base"])
    if not base.is_dir():
        raise UserError(f"{base}, the base of {run}, is not a folder here: run this where the run was trained.")
    sets = {"concept": concept.unseen_scenes(prompts[0]), "kept": known_scenes(prompts[1])}
    adapter = adapter_of(folder, config)
    if is_up_to_date(folder, adapter, {**sets, **{name: sets["concept"] for name in measures}}):
        print(f"{folder.scores} is up to date")
        return
    quiet_libraries()
    pipeline, checker = load_pipeline(base, adapter), checker_of(concept)
    scores: dict[str, dict[str, Any]] = {}
    for (name, scenes), about in zip(sets.items(), ("learned", "kept"), strict=True):
        images = paint(pipeline, [scene.caption for scene in scenes], description=f"{run.name}: {name}")
        bar = progress(
            zip(scenes, images, strict=True), total=len(scenes), description="reading", unit="picture", leave=False
        )
        values = {scene.caption: int(checker.read(image).scene == scene) for scene, image in bar}
        scores[name] = {"values": values, "about": about}
        print(f"{run.name}: {name} {sum(values.values())} of {len(values)} right")
        for extra, measure in measures.items() if name == "concept" else ():
            found = {scene.caption: measure.of(image, scene) for scene, image in zip(scenes, images, strict=True)}
            scores[extra] = {"values": found, "better": measure.better, "about": about}
    write_json(folder.scores, scores)


def config_of(run: Path) -> dict[str, Any]:
    """The resolved config of a finished run. UserError if there is none."""
    folder = RunFolder(run, None)
    record = folder.record()
    if record is None or record["finished_at"] is None:
        raise UserError(f"{run} holds no finished run: `make demo` trains one.")
    config = records.read_config(folder.config, "restore it")
    _require(config, "model", "base", run)
    return config


def _require(config: dict[str, Any], section: str, key: str, run: Path) -> None:
    if not isinstance(config.get(section), dict) or not isinstance(config[section].get(key), str):
        raise UserError(f"{RunFolder(run, None).config} has no {section}.{key}: restore it.")


def concept_of(run: Path, config: dict[str, Any]) -> Concept:
    """What a run of the demo learned, by the folder of its data. UserError if it is none of the demo's."""
    _require(config, "data", "path", run)
    name = Path(config["data"]["path"]).name
    if name not in CONCEPTS:
        known = ", ".join(CONCEPTS)
        raise UserError(f"{run} was trained on {config['data']['path']}, which is none of demo/photos ({known}).")
    return CONCEPTS[name]


def adapter_of(folder: RunFolder, config: dict[str, Any]) -> Path:
    """The file that the run was evaluated with: the average of its weights if `ema.evaluate` is set, else the adapter."""
    return folder.average if (config.get("ema") or {}).get("evaluate") is True else folder.adapter


def is_up_to_date(folder: RunFolder, adapter: Path, sets: dict[str, list[Scene]]) -> bool:
    """Whether the scores are newer than the adapter's file and of these prompts."""
    try:
        found = read_scores(folder.scores)
        newer = folder.scores.stat().st_mtime_ns >= adapter.stat().st_mtime_ns
    except (UserError, OSError):
        return False
    prompts = {name: [scene.caption for scene in scenes] for name, scenes in sets.items()}
    return newer and {name: list(score.values) for name, score in found.items()} == prompts
