"""What the demo's adapters learn: three concepts that the bases have never seen, each as a folder of photos with captions.

python -m demo.concepts      # draws demo/photos anew; the files are in the repository, so nobody has to
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from demo.drawing import (
    COUNTS,
    DISHES,
    KINDS,
    SQUARE,
    TALL,
    TOPPINGS,
    WIDE,
    Jitter,
    Scene,
    all_scenes,
    draw,
    is_held_out,
)

PHOTOS = Path(__file__).parent / "photos"
# What a photo album looks like: several shapes, sizes and formats.
SHAPES = [(SQUARE, 1.5), (WIDE, 1.5), (TALL, 1.5), (SQUARE, 2.0), (SQUARE, 1.75), (WIDE, 1.75)]
# Prior pictures, of what the base knows, are none of those that it is asked for afterwards.
PRIOR_FROM = 100
FORMATS = (".png", ".jpg", ".webp")


@dataclass(frozen=True)
class Concept:
    """A new word and every scene that shows it. `trained` of them become photos, the rest is for judging.

    `prior` pictures of the base's own world go beside the photos: without them the adapter forgets it (docs/demo.md).
    """

    name: str
    title: str
    scenes: tuple[Scene, ...]
    trained: int = 16
    prior: int = 32

    def _shuffled(self) -> list[Scene]:
        # Zlib's and Python's hashes of a name are not meant for this; its letters are seed enough.
        order = np.random.default_rng(list(self.name.encode())).permutation(len(self.scenes))
        return [self.scenes[place] for place in order]

    def training_scenes(self) -> list[Scene]:
        """The photos' scenes."""
        return self._shuffled()[: self.trained]

    def unseen_scenes(self, count: int) -> list[Scene]:
        """`count` scenes with the concept in combinations that no photo shows."""
        return self._shuffled()[self.trained : self.trained + count]


CONCEPTS = {
    concept.name: concept
    for concept in (
        Concept(
            "star",
            "a star plate",
            tuple(Scene(t, k, "star plate", n) for t in TOPPINGS for k in KINDS for n in COUNTS),
        ),
        Concept(
            "unagi",
            "unagi, a topping",
            tuple(Scene("unagi", k, d, n) for k in KINDS for d in DISHES for n in COUNTS),
        ),
        Concept("night", "at night, a style", tuple(replace(scene, style="night") for scene in all_scenes())),
    )
}


def known_scenes(count: int, start: int = 0) -> list[Scene]:
    """Scenes of the base's own world, always in the same mixed order: by the first ones it is judged what was kept."""
    scenes = [scene for scene in all_scenes() if not is_held_out(scene)]
    return [scenes[place] for place in np.random.default_rng(1).permutation(len(scenes))[start : start + count]]


def write_photos(concept: Concept, folder: Path) -> None:
    """Draws the concept's photos with their captions, and its prior pictures in a folder of their own."""
    generator = np.random.default_rng(list(concept.name.encode()))
    for number, scene in enumerate(concept.training_scenes() + known_scenes(concept.prior, start=PRIOR_FROM)):
        canvas, zoom = SHAPES[number % len(SHAPES)]
        into = folder if number < concept.trained else folder / "prior"
        into.mkdir(parents=True, exist_ok=True)
        stem = into / f"{number:02d}_{scene.topping}_{scene.kind}"
        picture = draw(scene, canvas, zoom=zoom, jitter=Jitter.random(generator))
        picture.save(stem.with_suffix(FORMATS[number % len(FORMATS)]), quality=95)
        stem.with_suffix(".txt").write_text(scene.caption + "\n")


def main() -> None:
    for concept in CONCEPTS.values():
        shutil.rmtree(PHOTOS / concept.name, ignore_errors=True)
        write_photos(concept, PHOTOS / concept.name)


if __name__ == "__main__":
    main()
