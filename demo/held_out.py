"""Held-out images of a concept for experiments. They show combinations that no training photo shows.

python -m demo.held_out      # writes demo/held_out again; not needed, as the files are in the repository
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from demo.concepts import CONCEPTS, Concept
from demo.drawing import SQUARE, Jitter, draw

FOLDER = Path(__file__).parent / "held_out"
COUNT = 32
# Positions and sizes differ from those in the photos and in the images that demo.measure draws for its own loss. With this seed
# no image is a near-duplicate of a photo; with 11 of the 20 seeds from 11 on, one is.
SEED = 19


def write_held_out(concept: Concept, folder: Path) -> None:
    """Writes `COUNT` images of unseen scenes with their captions."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng([SEED, *concept.name.encode()])
    for number, scene in enumerate(concept.unseen_scenes(COUNT)):
        stem = folder / f"{number:02d}_{scene.topping}_{scene.kind}"
        draw(scene, SQUARE, jitter=Jitter.random(generator)).save(stem.with_suffix(".png"), optimize=True)
        stem.with_suffix(".txt").write_text(scene.caption + "\n")


def main() -> None:
    shutil.rmtree(FOLDER / "star", ignore_errors=True)
    write_held_out(CONCEPTS["star"], FOLDER / "star")


if __name__ == "__main__":
    main()
