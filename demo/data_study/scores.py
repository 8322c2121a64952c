"""What the pictures of a run of the data study show, as a command for an experiment file.

    python -m demo.data_study.scores tags RUN     # or: stamp RUN; writes RUN/scores.json

Each score says of every scene whether the checker finds in its picture exactly what was asked for (1) or not (0).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from demo.checker import Checker
from demo.concepts import known_scenes
from demo.data_study.photos import STAR, reworded, tagged, without_stamp
from demo.drawing import Scene
from demo.measure import checker_of
from demo.painter import GUIDANCE, load_pipeline, paint
from demo.scoring import config_of
from sushi_research.config.process import begin, run_main
from sushi_research.files import write_json
from sushi_research.runs.run_folder import RunFolder
from sushi_research.training.run import quiet_libraries

SCENES = 24
STRONG = 5.0


@dataclass(frozen=True)
class Drawn:
    """The pictures of some scenes, asked for by `prompts`."""

    scenes: list[Scene]
    prompts: list[str]
    guidance: float = GUIDANCE


@dataclass(frozen=True)
class Score:
    """One score of a data set: of which pictures (`drawn`), and what it is about.

    `covered`: what is in the place of the stamp is not looked at.
    """

    drawn: str
    about: str | None
    covered: bool = False

    def value(self, checker: Checker, picture: Image.Image, asked: Scene) -> int:
        """1 if a picture shows what was asked for."""
        return int(checker.read(without_stamp(picture) if self.covered else picture).scene == asked)


def _in_other_orders(scenes: Sequence[Scene]) -> list[str]:
    generator = np.random.default_rng(5)
    return [tagged(scene, generator) for scene in scenes]


STARS, KNOWN = STAR.unseen_scenes(SCENES), known_scenes(SCENES)
KEPT = Drawn(KNOWN, [scene.caption for scene in KNOWN])
DRAWN: dict[str, dict[str, Drawn]] = {
    "tags": {
        "tags": Drawn(STARS, [tagged(scene) for scene in STARS]),
        "other orders": Drawn(STARS, _in_other_orders(STARS)),
        "second wording": Drawn(STARS, [reworded(scene) for scene in STARS]),
        "strong guidance": Drawn(STARS, [tagged(scene) for scene in STARS], STRONG),
        "known": KEPT,
    },
    "stamp": {"stars": Drawn(STARS, [scene.caption for scene in STARS]), "known": KEPT},
}
SCORES: dict[str, dict[str, Score]] = {
    "tags": {
        "tags as in training": Score("tags", "learned"),
        "tags in other orders": Score("other orders", "learned"),
        "second wording": Score("second wording", "learned"),
        "strong guidance": Score("strong guidance", None),
        "kept": Score("known", "kept"),
    },
    "stamp": {
        "plate": Score("stars", "learned", covered=True),
        "plate without the stamp": Score("stars", None),
        "kept": Score("known", "kept"),
    },
}


def main(arguments: Sequence[str]) -> None:
    """Scores a finished run."""
    parser = argparse.ArgumentParser("python -m demo.data_study.scores", description="Score the pictures of a run.")
    parser.add_argument("set", choices=SCORES, help="which data set the run was trained on")
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a finished run of the data study")
    given = parser.parse_args(arguments)
    begin()
    run_main(lambda each: score_run(each.set, each.run), given)


def score_run(name: str, run: Path) -> None:
    """Writes RUN/scores.json. UserError for what is no finished run of the demo."""
    config, folder = config_of(run), RunFolder(run, None)
    quiet_libraries()
    scores = scores_of(name, load_pipeline(Path(config["model"]["base"]), folder.adapter), checker_of(STAR), run.name)
    write_json(folder.scores, scores)


def scores_of(name: str, pipeline: Any, checker: Checker, who: str) -> dict[str, dict[str, Any]]:
    """The scores of a pipeline by name, in the form of scores.json; a unit is the caption of a scene."""
    pictures = {
        each: paint(pipeline, drawn.prompts, guidance=drawn.guidance, description=f"{who}: {each}")
        for each, drawn in DRAWN[name].items()
    }
    found = {}
    for title, score in SCORES[name].items():
        scenes = DRAWN[name][score.drawn].scenes
        values = {
            scene.caption: score.value(checker, picture, scene)
            for scene, picture in zip(scenes, pictures[score.drawn], strict=True)
        }
        found[title] = {"values": values} | ({"about": score.about} if score.about else {})
        print(f"{who}: {title} {sum(values.values())} of {len(values)} right", flush=True)
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
