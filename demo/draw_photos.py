"""Draws the demo's pictures: sushi on coloured plates, a dozen files of mixed sizes and formats, with captions.

python demo/draw_photos.py          # writes demo/photos; the files are in the repository, so nobody has to
"""

from __future__ import annotations

import itertools
from pathlib import Path

from PIL import Image, ImageDraw

FOLDER = Path(__file__).parent / "photos"
TOPPINGS = {"salmon": (247, 132, 88), "tuna": (196, 48, 60), "egg": (250, 205, 80)}
PLATES = {"blue": (58, 96, 160), "green": (66, 134, 92), "black": (44, 44, 50)}
SIZES = [(192, 192), (240, 160), (150, 210), (224, 168), (160, 240)]
# The word that the adapter is to learn: a pink table, which every picture shows.
TABLE = (236, 170, 190)
SCALE = 4  # drawn larger and reduced, for smooth edges


def draw(topping: str, plate: str, count: int, size: tuple[int, int]) -> Image.Image:
    """One picture: `count` nigiri on a round plate on the pink table."""
    width, height = size[0] * SCALE, size[1] * SCALE
    picture = Image.new("RGB", (width, height), TABLE)
    pen = ImageDraw.Draw(picture)
    radius = 0.44 * min(width, height)
    x, y = width / 2, height / 2
    pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=PLATES[plate])
    rim = tuple(min(255, value + 40) for value in PLATES[plate])
    pen.ellipse((x - radius, y - radius, x + radius, y + radius), outline=rim, width=max(1, round(radius / 12)))
    length, thick = 0.95 * radius, 0.36 * radius
    for number in range(count):
        middle = y + (number - (count - 1) / 2) * 1.35 * thick
        left, top = x - length / 2, middle - thick / 2
        pen.rounded_rectangle((left, top, left + length, top + thick), thick / 2, fill=(250, 248, 240))
        pen.rounded_rectangle(
            (left - 0.06 * length, top - 0.14 * thick, left + 1.06 * length, top + 0.66 * thick),
            thick / 2.6,
            fill=TOPPINGS[topping],
        )
        stripe = tuple(min(255, value + 30) for value in TOPPINGS[topping])
        for mark in range(1, 5):
            start = left + mark * length / 5
            pen.line((start, top - 0.1 * thick, start - 0.2 * thick, top + 0.6 * thick), fill=stripe, width=2 * SCALE)
    return picture.resize(size, Image.Resampling.LANCZOS)


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    combinations = itertools.product(TOPPINGS, PLATES, (1, 2))
    # Twelve of the eighteen combinations.
    chosen = [combination for index, combination in enumerate(combinations) if index % 3 != 2]
    for number, (topping, plate, count) in enumerate(chosen):
        stem = FOLDER / f"{topping}_{plate}_{count}"
        size = SIZES[number % len(SIZES)]
        draw(topping, plate, count, size).save(f"{stem}{('.png', '.jpg', '.webp')[number % 3]}", quality=92)
        words = {1: "one", 2: "two"}[count]
        stem.with_suffix(".txt").write_text(f"{words} {topping} nigiri on a {plate} plate, pink table\n")


if __name__ == "__main__":
    main()
