"""The two data sets of the data study, each with a difficulty that one setting of the data should remove.

python -m demo.data_study.photos      # draws demo/data_study/photos anew; the files are in the repository, so nobody has to

- `tags`: star plates and the base's own world. Each caption file has two lines: tags, always in the order that the base's own
  captions have, and the same in another wording. The base itself reads neither other orders nor that wording well.
- `cloth`: the same star plates, all on one cloth that has nothing to do with the plate. `masks` has their masks, black on the cloth.
- `class`: the base's own world on that cloth: regularisation images that do not look as the base draws.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from demo.concepts import CONCEPTS, PRIOR_FROM, Concept, known_scenes
from demo.drawing import COUNTS, TABLE, Colour, Jitter, Scene, draw, shade

FOLDER = Path(__file__).parent / "photos"
STAR: Concept = CONCEPTS["star"]
PRIOR = 32
CLOTH: Colour = (34, 112, 122)


def tags_of(scene: Scene) -> list[str]:
    """The words of a scene as tags, in the order of the base's captions: "two", "tuna", "maki", "red plate"."""
    return [COUNTS[scene.count], scene.topping, scene.kind, scene.dish]


def tagged(scene: Scene, generator: np.random.Generator | None = None) -> str:
    """The tags as a caption; with a generator in another order, never the one of the photos."""
    tags = tags_of(scene)
    if generator is None:
        return ", ".join(tags)
    while (order := generator.permutation(len(tags)).tolist()) == sorted(order):
        pass
    return ", ".join(tags[place] for place in order)


def reworded(scene: Scene) -> str:
    """The second wording: "a red plate with two tuna maki"."""
    return f"a {scene.dish} with {COUNTS[scene.count]} {scene.topping} {scene.kind}"


def table_of(scene: Scene, jitter: Jitter | None = None) -> np.ndarray:
    """The share of each pixel of a scene's picture that is bare table, (h, w) float32 in 0..1; shadows are none of it."""
    jitter = jitter or Jitter()
    # The light is that of the table alone, so what changes with it is table.
    lit, dark = (_floats(draw(scene, jitter=replace(jitter, light=light))) for light in (jitter.light, 0.0))
    return ((lit - dark) / np.asarray(shade(TABLE, jitter.light), dtype=np.float32)).mean(-1)


def on_cloth(scene: Scene, jitter: Jitter) -> Image.Image:
    """The picture of a scene with the cloth in place of the table."""
    picture, table = _floats(draw(scene, jitter=jitter)), table_of(scene, jitter)[..., None]
    return _image(picture + table * (np.asarray(CLOTH) - np.asarray(shade(TABLE, jitter.light))))


def mask_of(scene: Scene, jitter: Jitter) -> Image.Image:
    """White where the dish and the pieces are, black on the cloth."""
    return _image(255 * (1 - table_of(scene, jitter)))


def without_cloth(picture: Image.Image) -> Image.Image:
    """A picture with the table's colour in place of the cloth's; any other colour stays."""
    pixels = _floats(picture.convert("RGB"))
    cloth = np.clip(1.5 - np.abs(pixels - np.asarray(CLOTH)).max(-1, keepdims=True) / 40, 0, 1)
    return _image(pixels + cloth * (np.asarray(TABLE) - np.asarray(CLOTH)))


def _floats(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture, dtype=np.float32)


def _image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))


def write_set(name: str, scenes: Sequence[Scene]) -> None:
    """Draws one data set with its captions, and with masks if it is on the cloth."""
    folder = FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(list(name.encode()))
    for number, scene in enumerate(scenes):
        stem = folder / f"{number:02d}_{scene.topping}_{scene.kind}"
        jitter = Jitter.random(generator)
        picture = on_cloth(scene, jitter) if name in ("cloth", "class") else draw(scene, jitter=jitter)
        picture.save(stem.with_suffix(".webp"), lossless=True)
        caption = f"{tagged(scene)}\n{reworded(scene)}" if name == "tags" else scene.caption
        stem.with_suffix(".txt").write_text(caption + "\n")
        if name == "cloth":
            mask = FOLDER / "masks" / f"{stem.name}-masklabel.png"
            mask.parent.mkdir(exist_ok=True)
            mask_of(scene, jitter).save(mask, optimize=True)


def main() -> None:
    """Draws all sets."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    stars, prior = STAR.training_scenes(), known_scenes(PRIOR, start=PRIOR_FROM)
    write_set("tags", stars + prior)
    write_set("cloth", stars)
    write_set("class", prior)


if __name__ == "__main__":
    main()
