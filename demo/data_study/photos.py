"""The two data sets of the data study, each with a difficulty that one setting of the data should remove.

python -m demo.data_study.photos      # draws demo/data_study/photos anew; the files are in the repository, so nobody has to

- `tags`: star plates and the base's own world. Each caption file has two lines: tags, the dish first and the others always in
  the same order, and the same in another wording. The base, which knows sentences, reads neither well.
- `stamp`: the same star plates, and in the corner of each photo a stamp that has nothing to do with the plate. `masks` has their
  masks, black on the stamp.
- `class`: the base's own world, as regularisation images.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from demo.concepts import CONCEPTS, PRIOR_FROM, Concept, known_scenes
from demo.drawing import COUNTS, SQUARE, TABLE, Colour, Jitter, Scene, draw

FOLDER = Path(__file__).parent / "photos"
STAR: Concept = CONCEPTS["star"]
PRIOR = 32
# In units of the picture; no plate reaches there. The margin of the mask is about that of a latent's neighbourhood.
STAMP_AT, STAMP_RADIUS, MARGIN = (18, 18), 13, 6
INK: Colour = (30, 40, 120)


def tags_of(scene: Scene) -> list[str]:
    """The words of a scene as tags, the dish first: "red plate", "two", "tuna", "maki"."""
    return [scene.dish, COUNTS[scene.count], scene.topping, scene.kind]


def tagged(scene: Scene, generator: np.random.Generator | None = None) -> str:
    """The tags as a caption; with a generator the tags after the first in another order, never the one of the photos."""
    first, *others = tags_of(scene)
    order = list(range(len(others)))
    while generator is not None and order == sorted(order):
        order = generator.permutation(len(others)).tolist()
    return ", ".join([first, *(others[place] for place in order)])


def reworded(scene: Scene) -> str:
    """The second wording: "a red plate with two tuna maki"."""
    return f"a {scene.dish} with {COUNTS[scene.count]} {scene.topping} {scene.kind}"


def stamped(picture: Image.Image) -> Image.Image:
    """The picture with the stamp in its corner."""
    drawn = picture.resize([4 * side for side in picture.size], Image.Resampling.NEAREST)
    for radius, fill in ((STAMP_RADIUS, INK), (0.7 * STAMP_RADIUS, (250, 250, 250)), (0.4 * STAMP_RADIUS, INK)):
        _disc(drawn, radius, fill)
    return drawn.reduce(4)


def mask() -> Image.Image:
    """White but for the place of the stamp and a margin around it."""
    drawn = Image.new("L", [4 * side for side in SQUARE], 255)
    _disc(drawn, STAMP_RADIUS + MARGIN, 0)
    return drawn.reduce(4)


def without_stamp(picture: Image.Image) -> Image.Image:
    """A picture with bare table in place of what is where the stamp would be."""
    return Image.composite(picture.convert("RGB"), Image.new("RGB", SQUARE, TABLE), mask())


def _disc(drawn: Image.Image, radius: float, fill: int | Colour) -> None:
    ImageDraw.Draw(drawn).ellipse([4 * (at + sign * radius) for sign in (-1, 1) for at in STAMP_AT], fill=fill)


def write_set(name: str, scenes: Sequence[Scene]) -> None:
    """Draws one data set with its captions; the one with the stamp also has masks."""
    folder = FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(list(name.encode()))
    for number, scene in enumerate(scenes):
        stem = folder / f"{number:02d}_{scene.topping}_{scene.kind}"
        jitter = Jitter.random(generator)
        picture = draw(scene, jitter=jitter)
        (stamped(picture) if name == "stamp" else picture).save(stem.with_suffix(".webp"), lossless=True)
        caption = f"{tagged(scene)}\n{reworded(scene)}" if name == "tags" else scene.caption
        stem.with_suffix(".txt").write_text(caption + "\n")
        if name == "stamp":
            (FOLDER / "masks").mkdir(exist_ok=True)
            mask().save(FOLDER / f"masks/{stem.name}-masklabel.png", optimize=True)


def main() -> None:
    """Draws all sets."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    stars, prior = STAR.training_scenes(), known_scenes(PRIOR, start=PRIOR_FROM)
    write_set("tags", stars + prior)
    write_set("stamp", stars)
    write_set("class", prior)


if __name__ == "__main__":
    main()
