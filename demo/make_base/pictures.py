"""The training images of the bases, drawn from a seed; the repository does not contain them.

There are three sets: plain scenes in three aspect ratios; scenes for SDXL's micro-conditioning (small originals enlarged, wide
and tall originals cropped); and images for the VAE alone, with colours and patterns that do not occur in the scenes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from demo.drawing import SQUARE, TALL, WIDE, Jitter, Pen, Scene, all_scenes, draw, is_held_out

PLAIN = {SQUARE: 5200, WIDE: 1600, TALL: 1600}
SMALL = {SQUARE: 600, WIDE: 200, TALL: 200}  # originals smaller than the bucket, which are blurred when enlarged
CROPPED = 1000  # wide and tall originals cropped to a square
STRANGE = 4000  # for the VAE alone
VALIDATION = 64  # of each set, not used for training
OPENINGS = ("", "", "", "a photo of ", "a drawing of ", "sushi, ")


@dataclass(frozen=True)
class Row:
    """One training image: its scene and SDXL's time_ids (original height, width, crop top, left, target height, width)."""

    scene: Scene
    time_ids: tuple[int, int, int, int, int, int]
    plain: bool


def training_scenes() -> list[Scene]:
    """The scenes that the bases may see."""
    return [scene for scene in all_scenes() if not is_held_out(scene)]


def sentence(scene: Scene, generator: np.random.Generator) -> str:
    """The scene's caption after a random opening that does not describe it."""
    return OPENINGS[generator.integers(len(OPENINGS))] + scene.caption


def make_pictures(folder: Path, seed: int = 0) -> dict[tuple[int, int], tuple[np.ndarray, list[Row]]]:
    """Images of scenes by canvas: uint8 `(n, height, width, 3)` and a row for each. Existing files are read."""
    return {
        canvas: _remembered(folder / f"scenes_{canvas[0]}x{canvas[1]}", lambda canvas=canvas: _scenes(canvas, seed))
        for canvas in (SQUARE, WIDE, TALL)
    }


def make_strange(folder: Path, seed: int = 0) -> np.ndarray:
    """Images unlike the scenes, uint8 `(STRANGE, 128, 128, 3)`: half random shapes and patterns, half recoloured scenes."""

    def make() -> tuple[np.ndarray, list[Row]]:
        generator = np.random.default_rng([seed, 4])
        return np.stack(
            [strange_picture(generator) for _ in tqdm(range(STRANGE), desc="pictures outside the theme")]
        ), []

    return _remembered(folder / "strange", make)[0]


def _remembered(stem: Path, make: Callable[[], tuple[np.ndarray, list[Row]]]) -> tuple[np.ndarray, list[Row]]:
    pixels, rows = stem.with_suffix(".npy"), stem.with_suffix(".rows.npy")
    if not rows.is_file():
        stem.parent.mkdir(parents=True, exist_ok=True)
        made, of_it = make()
        np.save(pixels, made)
        np.save(rows, np.array(of_it, dtype=object), allow_pickle=True)
    return np.load(pixels, mmap_mode="r"), list(np.load(rows, allow_pickle=True))


def _scenes(canvas: tuple[int, int], seed: int) -> tuple[np.ndarray, list[Row]]:
    generator = np.random.default_rng([seed, *canvas])
    scenes = training_scenes()
    makers = [_plain] * PLAIN[canvas] + [_small] * SMALL[canvas] + [_cropped] * (CROPPED if canvas == SQUARE else 0)
    pictures, rows = [], []
    for place in tqdm(generator.permutation(len(makers)), desc=f"scenes of {canvas[0]}x{canvas[1]}"):
        scene = scenes[generator.integers(len(scenes))]
        picture, original, crop = makers[place](scene, canvas, generator)
        pictures.append(np.asarray(picture))
        time_ids = (original[1], original[0], crop[1], crop[0], canvas[1], canvas[0])
        rows.append(Row(scene, time_ids, makers[place] is _plain))
    return np.stack(pictures), rows


def _plain(scene: Scene, canvas: tuple[int, int], generator: np.random.Generator):
    """A scene at the canvas size with a random original size; a larger original would look the same after reduction."""
    zoom = generator.choice([1, 1, 1, 1.5, 2, 4, 8])
    return (
        draw(scene, canvas, jitter=Jitter.random(generator)),
        (round(canvas[0] * zoom), round(canvas[1] * zoom)),
        (0, 0),
    )


def _small(scene: Scene, canvas: tuple[int, int], generator: np.random.Generator):
    small = draw(scene, canvas, zoom=generator.choice([0.25, 0.375, 0.5]), jitter=Jitter.random(generator))
    return small.resize(canvas, Image.Resampling.BICUBIC), small.size, (0, 0)


def _cropped(scene: Scene, canvas: tuple[int, int], generator: np.random.Generator):
    wide = bool(generator.integers(2))
    original = (canvas[0] * 3 // 2, canvas[1]) if wide else (canvas[0], canvas[1] * 3 // 2)
    crop = generator.integers(canvas[0] // 2 + 1)
    left, top = (int(crop), 0) if wide else (0, int(crop))
    picture = draw(scene, original, jitter=Jitter.random(generator))
    return picture.crop((left, top, left + canvas[0], top + canvas[1])), original, (left, top)


def strange_picture(generator: np.random.Generator) -> np.ndarray:
    """One image unlike the scenes, uint8 `(128, 128, 3)`: a recoloured scene, or random shapes and patterns."""
    if generator.random() < 0.5:
        scenes = all_scenes()
        scene = scenes[generator.integers(len(scenes))]
        return _recoloured(np.asarray(draw(scene, jitter=Jitter.random(generator))), generator)
    pen = Pen(SQUARE, 1.0, _colour(generator))
    for _ in range(generator.integers(3, 13)):
        _SHAPES[generator.integers(len(_SHAPES))](pen, generator)
    return np.asarray(pen.finish())


def _recoloured(pixels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Permutes, inverts and mixes the channels: the same shapes in other colours."""
    mixed = pixels[..., generator.permutation(3)].astype(np.float32)
    inverted = generator.random(3) < 0.4
    mixed = np.where(inverted, 255 - mixed, mixed)
    weights = np.eye(3) + generator.uniform(-0.3, 0.3, (3, 3))
    return np.clip(mixed @ (weights / weights.sum(0)), 0, 255).round().astype(np.uint8)


def _colour(generator: np.random.Generator) -> tuple[int, int, int]:
    return tuple(int(value) for value in generator.integers(0, 256, 3))


def _ellipse(pen: Pen, generator: np.random.Generator) -> None:
    pen.ellipse(*generator.uniform(0, 128, 2), *generator.uniform(4, 48, 2), _colour(generator))


def _box(pen: Pen, generator: np.random.Generator) -> None:
    (x, y), (w, h) = generator.uniform(0, 128, 2), generator.uniform(4, 48, 2)
    pen.box(x - w, y - h, x + w, y + h, generator.uniform(0, 0.9) * min(w, h), _colour(generator))


def _polygon(pen: Pen, generator: np.random.Generator) -> None:
    middle = generator.uniform(0, 128, 2)
    corners = generator.uniform(-48, 48, (generator.integers(3, 7), 2))
    pen.polygon([tuple(middle + corner) for corner in corners], _colour(generator))


def _star(pen: Pen, generator: np.random.Generator) -> None:
    middle, radius = generator.uniform(0, 128, 2), generator.uniform(12, 60)
    points, turn, depth = int(generator.integers(4, 9)), generator.uniform(0, 6), generator.uniform(0.4, 0.9)
    angles = turn + np.pi * np.arange(2 * points) / points
    reach = radius * np.where(np.arange(2 * points) % 2, depth, 1.0)
    corners = middle + np.stack([reach * np.cos(angles), reach * np.sin(angles)], 1)
    pen.polygon([tuple(corner) for corner in corners], _colour(generator))


def _line(pen: Pen, generator: np.random.Generator) -> None:
    points = generator.uniform(0, 128, (generator.integers(2, 4), 2))
    pen.line([tuple(point) for point in points], generator.uniform(2, 8), _colour(generator))


def _pattern(pen: Pen, generator: np.random.Generator) -> None:
    """A field of squares, stripes or dots."""
    (x, y), step = generator.uniform(-20, 90, 2), generator.uniform(8, 18)
    first, second, form = _colour(generator), _colour(generator), generator.integers(3)
    across, down = generator.integers(3, 9, 2)
    pen.box(x, y, x + across * step, y + down * step, 0.1, second)
    for column in range(across):
        for row in range(down):
            left, top = x + column * step, y + row * step
            if form == 0 and (column + row) % 2:
                pen.box(left, top, left + step, top + step, 0.1, first)
            elif form == 1 and column % 2:
                pen.box(left, top, left + step, top + step, 0.1, first)
            elif form == 2:
                pen.ellipse(left + step / 2, top + step / 2, 0.3 * step, 0.3 * step, first)


_SHAPES = (_ellipse, _box, _polygon, _star, _line, _pattern)
