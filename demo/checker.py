"""Says from the pixels what a picture of `demo.drawing`'s world shows, or "none of these". No model takes part.

The picture is compared with the plain drawing of every scene. The difference forgives places and not colours: each pixel is held
against the best of its neighbourhood in the drawing, and each pixel of the drawing against the best of its neighbourhood in
the picture. So a piece may sit two pixels off, but blur makes colours that the drawing has nowhere near, a lost stripe is a
part of the drawing that is nowhere near, and noise is both. Pieces and dish are judged apart: pieces are small, and an error in
them would drown in a mean over the picture.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from PIL import Image

from demo.drawing import MOON, MOON_RADIUS, SQUARE, Scene, draw

REACH = 3  # pixels that something may be off, in a picture of 128 x 128
CANDIDATES = 12
# Mean difference (0 to 1) of pieces and of the rest above which a picture shows none of the scenes, and how sharp it must be:
# its squared differences of neighbours over those of the drawing. Calibrated on VAE reconstructions of 20 scenes, which must
# pass (at most 0.026 and 0.013; at least 0.68), also with latent noise of a fifth of the latents' deviation (0.035, 0.021;
# 0.64), and on pictures that must not: blur of 1.5 pixels (0.27 at most), noise of 10 % (0.058 and 0.065 at least).
PIECES_LIMIT = 0.045
DISH_LIMIT = 0.030
SHARPNESS = (0.45, 1.6)

WORDS = ("topping", "kind", "dish", "count", "style")


@dataclass(frozen=True)
class Reading:
    """What the checker sees: `scene` is None for "none of these"; `nearest` is what it would be otherwise."""

    scene: Scene | None
    nearest: Scene
    pieces: float
    dish: float
    sharpness: float


@dataclass(frozen=True)
class _Template:
    scene: Scene
    pixels: np.ndarray  # (h, w, 3) float32 in 0..1
    parts: tuple[np.ndarray, ...]  # (h, w) bool each: where the pieces are; at night, where the moon is

    @cached_property
    def rest(self) -> np.ndarray:
        """Where the dish and the table are."""
        return ~np.logical_or.reduce(self.parts)


class Checker:
    """Reads pictures as one of `scenes`, which all have the same canvas."""

    def __init__(self, scenes: Sequence[Scene], canvas: tuple[int, int] = SQUARE) -> None:
        self.canvas = canvas
        self.scenes = list(scenes)

    @cached_property
    def _templates(self) -> list[_Template]:
        empty: dict[tuple[str, str], np.ndarray] = {}
        templates = []
        for scene in self.scenes:
            dish = (scene.dish, scene.style)
            if dish not in empty:
                empty[dish] = _floats(draw(replace(scene, count=0), self.canvas))
            pixels = _floats(draw(scene, self.canvas))
            parts = (np.abs(pixels - empty[dish]).max(-1) > 0.02,)
            templates.append(_Template(scene, pixels, parts + ((self._moon,) if scene.style == "night" else ())))
        return templates

    @cached_property
    def _moon(self) -> np.ndarray:
        down, across = np.indices(self.canvas[::-1])
        return np.hypot(across + 0.5 - (self.canvas[0] - MOON), down + 0.5 - MOON) < MOON_RADIUS + 1

    @cached_property
    def _small(self) -> np.ndarray:
        return np.stack([_reduced(template.pixels, 4).ravel() for template in self._templates])

    @cached_property
    def _squares(self) -> np.ndarray:
        return np.square(self._small).sum(1)

    def read(self, picture: Image.Image) -> Reading:
        """The scene that the picture shows; a picture of another size is scaled to the canvas first."""
        if picture.size != self.canvas:
            picture = picture.resize(self.canvas, Image.Resampling.BOX)
        pixels = _floats(picture)
        # A first choice by plain differences at a quarter of the size, then the forgiving ones at half of it.
        small = _reduced(pixels, 4).ravel()
        distances = self._squares - 2 * self._small @ small
        chosen = [self._templates[place] for place in np.argsort(distances, kind="stable")[:CANDIDATES]]
        half = _reduced(pixels, 2)
        rough = [sum(_differences(half, _halved(template), (REACH + 1) // 2)) for template in chosen]
        best = chosen[int(np.argmin(rough))]
        pieces, dish = _differences(pixels, best, REACH)
        sharp = sharpness(pixels) / sharpness(best.pixels)
        passes = pieces <= PIECES_LIMIT and dish <= DISH_LIMIT and SHARPNESS[0] <= sharp <= SHARPNESS[1]
        return Reading(best.scene if passes else None, best.scene, pieces, dish, sharp)


@dataclass(frozen=True)
class Score:
    """How many of `total` pictures showed what was asked: all of it (`right`), and each word by itself."""

    total: int
    right: int
    none: int
    words: dict[str, int]
    confusions: Counter[tuple[str, str, str]]

    @property
    def share(self) -> float:
        """Fully right, 0 to 1."""
        return self.right / self.total

    def confusion_table(self, word: str) -> str:
        """Markdown: a row for each asked value of `word`, a column for each that was read, with counts."""
        cells = {(asked, read): n for (of, asked, read), n in self.confusions.items() if of == word}
        asked_ones = sorted({asked for asked, _ in cells})
        columns = sorted({read for _, read in cells} | set(asked_ones), key=lambda value: (value == "none", value))
        lines = [f"| {word} asked | " + " | ".join(columns) + " |", "|" + "---|" * (len(columns) + 1)]
        for asked in asked_ones:
            lines.append(f"| {asked} | " + " | ".join(str(cells.get((asked, column), "")) for column in columns) + " |")
        return "\n".join(lines)


def score(readings: Sequence[Reading], asked: Sequence[Scene]) -> Score:
    """Compares what was read with what was asked; a picture that shows none of the scenes is wrong in every word."""
    words, confusions = Counter(), Counter()
    for reading, scene in zip(readings, asked, strict=True):
        for word in WORDS:
            read = str(getattr(reading.scene, word)) if reading.scene else "none"
            wanted = str(getattr(scene, word))
            words[word] += read == wanted
            confusions[word, wanted, read] += 1
    return Score(
        total=len(asked),
        right=sum(reading.scene == scene for reading, scene in zip(readings, asked, strict=True)),
        none=sum(reading.scene is None for reading in readings),
        words={word: words[word] for word in WORDS},
        confusions=confusions,
    )


def sharpness(pixels: np.ndarray) -> float:
    """The mean squared difference of neighbours across and down, of `(h, w, 3)` in 0..1: blur lowers it, noise raises it."""
    return float(np.square(np.diff(pixels, axis=0)).mean() + np.square(np.diff(pixels, axis=1)).mean())


def _floats(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGB"), dtype=np.float32) / 255


def _reduced(pixels: np.ndarray, factor: int) -> np.ndarray:
    """Means of `factor` x `factor` pixels."""
    h, w, channels = pixels.shape
    return pixels.reshape(h // factor, factor, w // factor, factor, channels).mean((1, 3))


def _halved(template: _Template) -> _Template:
    parts = tuple(_reduced(part[..., None].astype(np.float32), 2)[..., 0] >= 0.5 for part in template.parts)
    return _Template(template.scene, _reduced(template.pixels, 2), parts)


def _differences(pixels: np.ndarray, template: _Template, reach: int) -> tuple[float, float]:
    """The forgiving difference within the pieces (or the moon, if that is worse) and in the rest."""
    both = np.maximum(_nearest(pixels, template.pixels, reach), _nearest(template.pixels, pixels, reach))
    return max(float(both[part].mean()) for part in template.parts), float(both[template.rest].mean())


def _nearest(pixels: np.ndarray, other: np.ndarray, reach: int) -> np.ndarray:
    """`(h, w)`: for each pixel the least mean absolute difference from `other` within `reach` pixels across and down."""
    padded = np.pad(other, ((reach, reach), (reach, reach), (0, 0)), mode="edge")
    h, w, _ = pixels.shape
    least = np.full((h, w), np.inf, dtype=np.float32)
    for y in range(2 * reach + 1):
        for x in range(2 * reach + 1):
            np.minimum(least, np.abs(pixels - padded[y : y + h, x : x + w]).mean(-1), out=least)
    return least
