"""The checker on the drawing code's own pictures, and on pictures that must not pass."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from demo.checker import Checker, score
from demo.concepts import CONCEPTS
from demo.drawing import SQUARE, TALL, WIDE, Jitter, Scene, all_scenes, draw


@functools.cache
def checker() -> Checker:
    """One for all tests of this process: it draws 776 templates, all scenes by day and those of the concepts among them."""
    new = [scene for concept in CONCEPTS.values() for scene in concept.scenes if scene.style == "day"]
    return Checker(list(dict.fromkeys(all_scenes() + new)))


def drawn(count: int, seed: int = 0) -> tuple[list[Scene], list[Image.Image]]:
    generator = np.random.default_rng([seed, *SQUARE])
    scenes = checker().scenes
    chosen = [scenes[place] for place in generator.permutation(len(scenes))[:count]]
    return chosen, [draw(scene, jitter=Jitter.random(generator)) for scene in chosen]


def read_all(pictures):
    return [checker().read(picture) for picture in pictures]


@pytest.mark.parametrize("canvas", [WIDE, TALL], ids=["wide", "tall"])
@pytest.mark.slow
def test_pictures_of_another_shape_are_read_right(canvas) -> None:
    some = Checker(checker().scenes[::6], canvas)
    generator = np.random.default_rng([0, *canvas])
    asked = [some.scenes[place] for place in generator.permutation(len(some.scenes))[:8]]
    pictures = [draw(scene, canvas, jitter=Jitter.random(generator)) for scene in asked]
    assert [some.read(picture).scene for picture in pictures] == asked


@pytest.mark.slow
def test_night_is_light_and_a_moon() -> None:
    night = Checker(CONCEPTS["night"].scenes[::8])
    asked = night.scenes[::8]
    pictures = [draw(scene) for scene in asked]
    assert [night.read(picture).scene for picture in pictures] == asked
    for picture in pictures:
        dark = picture.copy()
        dark.paste(picture.getpixel((4, 4)), (100, 0, 128, 28))
        assert night.read(dark).scene is None, "no moon"
    assert [night.read(blurred(picture, 1.5)).scene for picture in pictures] == [None] * len(asked)
    by_day = [draw(replace(scene, style="day")) for scene in asked]
    assert [night.read(picture).scene for picture in by_day] == [None] * len(asked)


@pytest.mark.slow
def test_scenes_of_every_kind_are_read_right_and_the_confusion_table_is_diagonal() -> None:
    asked, pictures = drawn(48, seed=1)
    for word in ("topping", "kind", "dish", "count"):
        assert {getattr(scene, word) for scene in asked} == {getattr(scene, word) for scene in checker().scenes}, word
    of_it = score(read_all(pictures), asked)
    assert of_it.right == of_it.total == 48 and of_it.none == 0
    assert all(asked == read for _, asked, read in of_it.confusions)


def test_another_size_is_scaled_first() -> None:
    scene = Scene("octopus", "gunkan", "white tray", 2)
    assert checker().read(draw(scene, zoom=3.0)).scene == scene


def blurred(picture: Image.Image, sigma: float) -> Image.Image:
    return picture.filter(ImageFilter.GaussianBlur(sigma))


def noisy(picture: Image.Image, deviation: float) -> Image.Image:
    noise = np.random.default_rng(0).normal(0, deviation, (picture.height, picture.width, 3))
    return Image.fromarray(np.clip(np.asarray(picture) + noise, 0, 255).astype(np.uint8))


@pytest.mark.parametrize(
    "spoil",
    [lambda picture: blurred(picture, 1.5), lambda picture: blurred(picture, 4), lambda picture: noisy(picture, 25)],
    ids=["blur of 1.5 pixels", "blur of 4 pixels", "noise of 10 %"],
)
@pytest.mark.slow
def test_spoiled_pictures_are_none_of_these(spoil) -> None:
    _, pictures = drawn(6)
    assert [reading.scene for reading in read_all(map(spoil, pictures))] == [None] * 6


def test_slightly_soft_pictures_pass() -> None:
    """The threshold is for pictures that a VAE made: half a pixel of blur and a little noise are not what it is about."""
    asked, pictures = drawn(12)
    assert [reading.scene for reading in read_all(noisy(blurred(picture, 0.7), 4) for picture in pictures)] == asked


def test_pictures_of_nothing_are_none_of_these() -> None:
    generator = np.random.default_rng(0)
    flat = [Image.new("RGB", SQUARE, colour) for colour in ("white", "black", (230, 216, 196))]
    noise = [Image.fromarray(generator.integers(0, 256, (128, 128, 3), dtype=np.uint8))]
    empty = [draw(Scene("salmon", "maki", "blue plate", 0))]
    assert [reading.scene for reading in read_all(flat + noise + empty)] == [None] * 5


def test_a_mixture_of_two_scenes_is_none_of_these() -> None:
    first = draw(Scene("salmon", "nigiri", "blue plate"))
    for other in (
        Scene("cucumber", "nigiri", "blue plate"),
        Scene("salmon", "nigiri", "yellow plate"),
        Scene("salmon", "maki", "blue plate"),
    ):
        assert checker().read(Image.blend(first, draw(other), 0.5)).scene is None, other


def test_one_piece_of_two_is_not_two() -> None:
    two = draw(Scene("tuna", "maki", "white plate", 2))
    half = draw(Scene("tuna", "maki", "white plate", 0))
    half.paste(two.crop((0, 0, 64, 128)), (0, 0))
    assert checker().read(half).scene is None


def test_the_score_counts_words_and_confusions() -> None:
    asked = [Scene("salmon", "maki", "blue plate"), Scene("egg", "maki", "blue plate")]
    of_it = score(read_all([draw(asked[0]), draw(asked[0])]), asked)
    assert (of_it.total, of_it.right, of_it.none, of_it.share) == (2, 1, 0, 0.5)
    assert of_it.words == {"topping": 1, "kind": 2, "dish": 2, "count": 2, "style": 2}
    assert of_it.confusion_table("topping").splitlines() == [
        "| topping asked | egg | salmon |",
        "|---|---|---|",
        "| egg |  | 1 |",
        "| salmon |  | 1 |",
    ]
