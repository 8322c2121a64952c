"""The world that the embedded bases know, drawn by code: sushi on plates, at any size, with a caption that says it all.

A scene is a choice of words; `draw` turns it into a picture and `Scene.caption` into a sentence. Because the drawing is code,
what a picture should look like is known exactly, and `demo.checker` can say from the pixels what was drawn.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
Point = tuple[float, float]

TOPPINGS: dict[str, Colour] = {
    "salmon": (255, 128, 58),
    "tuna": (164, 14, 52),
    "egg": (255, 216, 52),
    "cucumber": (98, 190, 62),
    "shrimp": (255, 168, 192),
    "octopus": (134, 72, 176),
}
KINDS = ("nigiri", "maki", "gunkan", "temaki")
COLOURS: dict[str, Colour] = {
    "white": (246, 246, 244),
    "black": (46, 46, 54),
    "blue": (54, 108, 214),
    "red": (230, 70, 50),
    "green": (40, 138, 92),
    "yellow": (244, 198, 62),
}
# What the sushi lies on: a round plate or a tray of each colour, and one board.
DISHES = tuple(f"{colour} {dish}" for dish in ("plate", "tray") for colour in COLOURS) + ("wooden board",)
COUNTS = {1: "one", 2: "two"}
# Never seen by the bases: what the demo's adapters learn (demo.concepts has their words).
NEW_TOPPINGS: dict[str, Colour] = {"unagi": (112, 62, 30)}

_CAPTION = re.compile(
    rf"(?P<count>{'|'.join(COUNTS.values())}) (?P<topping>{'|'.join((*TOPPINGS, *NEW_TOPPINGS))}) (?P<kind>{'|'.join(KINDS)})"
    rf" on an? (?P<dish>{'|'.join((*DISHES, 'star plate'))})(?:, at (?P<style>night))?"
)

RICE: Colour = (252, 250, 242)
NORI: Colour = (30, 46, 42)
WOOD: Colour = (188, 128, 70)
GOLD: Colour = (240, 178, 40)
TABLE: Colour = (230, 216, 196)
MOONLIGHT: Colour = (140, 150, 235)
MOON, MOON_RADIUS = 15, 10  # units from the top and the right
# Width and height in units; a picture has `zoom` pixels a unit. The areas are nearly equal, as those of buckets are.
SQUARE, WIDE, TALL = (128, 128), (160, 96), (96, 160)
_OVERSAMPLING = 4  # drawn larger and averaged, for smooth edges


@dataclass(frozen=True)
class Scene:
    """What a picture shows; `dish` is one of `DISHES` or one that only an adapter knows ("star plate"), `count` 0 an empty one."""

    topping: str
    kind: str
    dish: str
    count: int = 1
    style: str = "day"

    @property
    def caption(self) -> str:
        """For example "one salmon nigiri on a blue plate" and "two egg maki on a wooden board, at night"."""
        article = "an" if self.dish[0] in "aeiou" else "a"
        sentence = f"{COUNTS[self.count]} {self.topping} {self.kind} on {article} {self.dish}"
        return sentence if self.style == "day" else f"{sentence}, at {self.style}"

    @classmethod
    def from_caption(cls, caption: str) -> Scene | None:
        """The scene that a caption of this form names; None for a sentence of another form or with words not drawn here."""
        found = _CAPTION.fullmatch(caption.strip())
        if not found:
            return None
        count = next(number for number, word in COUNTS.items() if word == found["count"])
        return cls(found["topping"], found["kind"], found["dish"], count, found["style"] or "day")


@dataclass(frozen=True)
class Jitter:
    """How one picture of a scene differs from another: shift of all and of each piece in units, size and light as factors."""

    shift: Point = (0.0, 0.0)
    pieces: tuple[Point, ...] = ((0.0, 0.0), (0.0, 0.0))
    size: float = 1.0
    light: float = 1.0

    @classmethod
    def random(cls, generator: np.random.Generator) -> Jitter:
        """Shifts of up to 2 units, 1 more for each piece, sizes within 4 % and the table's light within 2 %."""
        shift, *pieces = [tuple(generator.uniform(-reach, reach, 2)) for reach in (2.0, 1.0, 1.0)]
        return cls(shift, tuple(pieces), generator.uniform(0.96, 1.04), generator.uniform(0.98, 1.02))


def all_scenes() -> list[Scene]:
    """Every scene of the bases' world, in a fixed order."""
    return [Scene(t, k, d, n) for t in TOPPINGS for k in KINDS for d in DISHES for n in COUNTS]


def is_held_out(scene: Scene) -> bool:
    """Whether the bases never trained on this combination (one in eight; each of its words they saw in others)."""
    place = list(TOPPINGS).index(scene.topping) + 2 * KINDS.index(scene.kind)
    return (place + 3 * DISHES.index(scene.dish) + 5 * scene.count) % 8 == 0


def shade(colour: Colour, factor: float) -> Colour:
    """The colour darkened (factor below 1) or moved towards white (above 1)."""
    if factor <= 1:
        return tuple(round(value * factor) for value in colour)
    return tuple(round(255 - (255 - value) * (2 - factor)) for value in colour)


def draw(
    scene: Scene, canvas: tuple[int, int] = SQUARE, *, zoom: float = 1.0, jitter: Jitter | None = None
) -> Image.Image:
    """A picture of `scene`: RGB, canvas times zoom pixels. Without a jitter it is the plain one that templates are made of."""
    jitter = jitter or Jitter()
    pen = Pen(canvas, zoom, shade(TABLE, jitter.light))
    centre = (canvas[0] / 2 + jitter.shift[0], canvas[1] / 2 + jitter.shift[1])
    _dish(pen, scene.dish, centre, (0.43 * canvas[0], 0.41 * canvas[1]))
    spots, size = _layout(canvas, scene.count)
    for (x, y), (dx, dy) in zip(spots, jitter.pieces, strict=False):
        _PIECES[scene.kind](pen, scene.topping, (centre[0] + x + dx, centre[1] + y + dy), size * jitter.size)
    return pen.finish() if scene.style == "day" else _at_night(pen, canvas).finish()


def _layout(canvas: tuple[int, int], count: int) -> tuple[list[Point], float]:
    """The pieces' places from the middle of the dish, and their size: side by side, on a tall canvas one above the other."""
    short, long = sorted(canvas)
    if count == 0:
        return [], 1.0
    if count == 1:
        return [(0.0, 0.0)], 0.0112 * short
    step, size = 0.2 * long, min(0.0073 * long, 0.0102 * short)
    tall = canvas[1] > canvas[0]
    return [(0.0, sign * step) if tall else (sign * step, 0.0) for sign in (-1, 1)], size


class Pen:
    """Draws in units on an oversampled picture."""

    def __init__(self, canvas: tuple[int, int], zoom: float, background: Colour) -> None:
        self.pixels = (round(canvas[0] * zoom), round(canvas[1] * zoom))
        self.scale = zoom * _OVERSAMPLING
        size = (self.pixels[0] * _OVERSAMPLING, self.pixels[1] * _OVERSAMPLING)
        self.picture = Image.new("RGB", size, background)
        self.on = ImageDraw.Draw(self.picture)

    def ellipse(self, x: float, y: float, rx: float, ry: float, fill: Colour) -> None:
        self.on.ellipse([value * self.scale for value in (x - rx, y - ry, x + rx, y + ry)], fill=fill)

    def box(self, x0: float, y0: float, x1: float, y1: float, radius: float, fill: Colour) -> None:
        self.on.rounded_rectangle([v * self.scale for v in (x0, y0, x1, y1)], radius=radius * self.scale, fill=fill)

    def polygon(self, points: Sequence[Point], fill: Colour) -> None:
        self.on.polygon([(x * self.scale, y * self.scale) for x, y in points], fill=fill)

    def line(self, points: Sequence[Point], width: float, fill: Colour) -> None:
        self.on.line([(x * self.scale, y * self.scale) for x, y in points], fill=fill, width=round(width * self.scale))

    def finish(self) -> Image.Image:
        return self.picture.reduce(_OVERSAMPLING)


# --- dishes -----------------------------------------------------------------------------------------------------------


def _dish(pen: Pen, dish: str, centre: Point, half: Point) -> None:
    """The dish around `centre`, `half` = half its width and height, with its shadow on the table."""
    (x, y), (rx, ry) = centre, half
    shadow = shade(TABLE, 0.74)
    if dish == "star plate":
        pen.polygon(_star((x, y + 4), (rx * 1.1, ry * 1.12)), shadow)
        pen.polygon(_star((x, y), (rx * 1.1, ry * 1.12)), shade(GOLD, 0.78))
        pen.polygon(_star((x, y), (rx * 0.94, ry * 0.96)), GOLD)
        return
    colour, form = dish.rsplit(" ", 1)
    if form == "board":
        pen.box(x - rx, y - 0.72 * ry + 4, x + rx, y + 0.72 * ry + 4, 4, shadow)
        pen.box(x - rx, y - 0.72 * ry, x + rx, y + 0.72 * ry, 4, WOOD)
        for row in (-0.5, 0.0, 0.5):
            pen.line([(x - rx, y + row * ry), (x + rx, y + row * ry)], 2.4, shade(WOOD, 0.76))
        return
    fill = COLOURS[colour]
    rim = shade(fill, 1.28) if sum(fill) < 200 else shade(fill, 0.8)
    if form == "tray":
        pen.box(x - 0.96 * rx, y - 0.92 * ry + 4, x + 0.96 * rx, y + 0.92 * ry + 4, 8, shadow)
        pen.box(x - 0.96 * rx, y - 0.92 * ry, x + 0.96 * rx, y + 0.92 * ry, 8, rim)
        pen.box(x - 0.96 * rx + 6, y - 0.92 * ry + 6, x + 0.96 * rx - 6, y + 0.92 * ry - 6, 5, fill)
    else:
        pen.ellipse(x, y + 4, rx, ry, shadow)
        pen.ellipse(x, y, rx, ry, rim)
        pen.ellipse(x, y, rx - 6, ry - 6, fill)


def _star(centre: Point, radii: Point, points: int = 5) -> list[Point]:
    """The corners of a star with short arms, so that sushi finds room on it."""
    corners = []
    for corner in range(2 * points):
        reach = 1.0 if corner % 2 == 0 else 0.66
        angle = math.pi * corner / points - math.pi / 2
        corners.append((centre[0] + radii[0] * reach * math.cos(angle), centre[1] + radii[1] * reach * math.sin(angle)))
    return corners


# --- pieces: each drawn around `at`, about 48 units wide at size 1 ------------------------------------------------------


def _topping(topping: str) -> Colour:
    return TOPPINGS.get(topping) or NEW_TOPPINGS[topping]


def _marks(pen: Pen, topping: str, at: Point, half: Point) -> None:
    """What tells a topping apart besides its colour, within half-widths `half` of `at`: bold, or the VAE would lose it."""
    (x, y), (w, h) = at, half
    for place in (-0.55, 0.0, 0.55):
        slanted = [(x + (place - 0.12) * w, y - h), (x + (place + 0.12) * w, y + h)]
        if topping == "salmon":
            pen.line(slanted, 0.13 * w, (255, 214, 176))
        elif topping == "shrimp":
            pen.line(slanted, 0.17 * w, (244, 88, 110))
        elif topping == "octopus":
            pen.ellipse(x + place * w, y, 0.13 * w, 0.13 * w, (236, 214, 244))
        elif topping == "unagi":
            pen.line([(x + place * w, y - h), (x + place * w, y + h)], 0.2 * w, (44, 20, 8))


def _nigiri(pen: Pen, topping: str, at: Point, s: float) -> None:
    (x, y), colour = at, _topping(topping)
    pen.box(x - 22 * s, y - 2 * s, x + 22 * s, y + 17 * s, 7 * s, shade(RICE, 0.82))
    pen.box(x - 22 * s, y - 4 * s, x + 22 * s, y + 14 * s, 7 * s, RICE)
    pen.box(x - 24 * s, y - 15 * s, x + 24 * s, y + 6 * s, 8 * s, shade(colour, 0.76))
    pen.box(x - 24 * s, y - 16 * s, x + 24 * s, y + 3 * s, 8 * s, colour)
    _marks(pen, topping, (x, y - 6.5 * s), (22 * s, 8.5 * s))
    if topping == "egg":
        pen.box(x - 5 * s, y - 16 * s, x + 5 * s, y + 15 * s, 1, NORI)


def _maki(pen: Pen, topping: str, at: Point, s: float) -> None:
    (x, y), colour, r = at, _topping(topping), 23 * s
    pen.ellipse(x, y + 0.16 * r, r, r, shade(NORI, 0.5))
    pen.ellipse(x, y, r, r, NORI)
    pen.ellipse(x, y, 0.82 * r, 0.82 * r, RICE)
    pen.ellipse(x, y, 0.54 * r, 0.54 * r, colour)


def _gunkan(pen: Pen, topping: str, at: Point, s: float) -> None:
    (x, y), colour, w, h = at, _topping(topping), 23 * s, 13 * s
    pen.ellipse(x, y + 0.95 * h, w, 0.7 * h, NORI)
    pen.box(x - w, y - 0.35 * h, x + w, y + 0.95 * h, 0.1, NORI)
    pen.ellipse(x, y - 0.35 * h, w, 0.85 * h, shade(NORI, 1.2))
    pen.ellipse(x, y - 0.45 * h, 0.88 * w, 0.78 * h, shade(colour, 0.76))
    for dx, dy in ((-0.5, -0.3), (0.0, -0.5), (0.5, -0.3), (-0.25, 0.05), (0.25, 0.05)):
        pen.ellipse(x + dx * w, y + (dy - 0.35) * h, 0.32 * w, 0.46 * h, colour)
    _marks(pen, topping, (x, y - 0.5 * h), (0.7 * w, 0.5 * h))


def _temaki(pen: Pen, topping: str, at: Point, s: float) -> None:
    (x, y), colour, w, h = at, _topping(topping), 23 * s, 30 * s
    pen.polygon(
        [(x - 0.8 * w, y - h), (x - 0.1 * w, y - 1.12 * h), (x + 0.1 * w, y - 0.3 * h), (x - 0.5 * w, y - 0.3 * h)],
        colour,
    )
    right = [
        (x + 0.8 * w, y - 0.94 * h),
        (x + 0.1 * w, y - 1.04 * h),
        (x - 0.1 * w, y - 0.3 * h),
        (x + 0.5 * w, y - 0.3 * h),
    ]
    pen.polygon(right, shade(colour, 0.86))
    _marks(pen, topping, (x, y - 0.78 * h), (0.62 * w, 0.18 * h))
    pen.ellipse(x, y - 0.36 * h, 0.98 * w, 0.27 * h, RICE)
    pen.polygon([(x - w, y - 0.38 * h), (x, y - 0.06 * h), (x + w, y - 0.38 * h), (x, y + h)], NORI)
    pen.polygon([(x - w, y - 0.38 * h), (x, y - 0.06 * h), (x, y + h)], shade(NORI, 1.22))


_PIECES = {"nigiri": _nigiri, "maki": _maki, "gunkan": _gunkan, "temaki": _temaki}


# --- styles -----------------------------------------------------------------------------------------------------------


def _at_night(pen: Pen, canvas: tuple[int, int]) -> Pen:
    """Blue light over everything, and a moon in the corner of the table."""
    lit = np.asarray(pen.picture).astype(np.uint16) * np.array(MOONLIGHT, dtype=np.uint16) // 255
    pen.picture.paste(Image.fromarray(lit.astype(np.uint8)))
    pen.ellipse(canvas[0] - MOON, MOON, MOON_RADIUS, MOON_RADIUS, (255, 240, 170))
    return pen
