"""Held-out images of a concept for experiments. They show combinations that no training photo shows.

python -m demo.held_out      # writes demo/held_out again; not needed, as the files are in the repository
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from demo.concepts import CONCEPTS, Concept, known_scenes
from demo.drawing import SQUARE, Jitter, Scene, draw

FOLDER = Path(__file__).parent / "held_out"
COUNT = 32
# Prior images: what the base knows. Scenes 0 to 31 are scored (demo.measure), 100 to 131 are prior images for training.
PRIOR, PRIOR_FROM = 16, 200
# Positions and sizes differ from those in the photos and in the images that demo.measure draws for its own loss. With this seed
# no image is a near-duplicate of a photo; with 11 of the 20 seeds from 11 on, one is.
SEED = 19


def write_held_out(concept: Concept, folder: Path) -> None:
    """Writes `COUNT` images of unseen scenes with their captions."""
    write_scenes(concept.unseen_scenes(COUNT), folder, concept.name)


def write_prior(folder: Path) -> None:
    """Writes `PRIOR` images of the base's own world, of scenes that are neither prior images of a concept nor scored."""
    write_scenes(known_scenes(PRIOR, start=PRIOR_FROM), folder, "prior")


def write_scenes(scenes: Sequence[Scene], folder: Path, key: str) -> None:
    """Writes an image of each scene with its caption; `key` seeds their positions and sizes."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    generator = np.random.default_rng([SEED, *key.encode()])
    for number, scene in enumerate(scenes):
        stem = folder / f"{number:02d}_{scene.topping}_{scene.kind}"
        draw(scene, SQUARE, jitter=Jitter.random(generator)).save(stem.with_suffix(".png"), optimize=True)
        stem.with_suffix(".txt").write_text(scene.caption + "\n")


def main() -> None:
    for concept in CONCEPTS.values():
        write_held_out(concept, FOLDER / concept.name)
    write_prior(FOLDER / "prior")


if __name__ == "__main__":
    main()
