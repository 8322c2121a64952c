"""The data study: its photos and captions, and that its page is of the recorded runs and these files."""

from __future__ import annotations

import numpy as np

from demo.data_study import photos
from demo.data_study.scores import DRAWN
from demo.drawing import Scene, draw

SCENE = Scene("tuna", "maki", "star plate", 2)


def test_tags_in_another_order_are_the_same_tags_with_the_first_one_kept():
    assert photos.tagged(SCENE) == "star plate, two, tuna, maki"
    generator = np.random.default_rng(0)
    others = {photos.tagged(SCENE, generator) for _ in range(100)}
    assert len(others) == 5 and photos.tagged(SCENE) not in others
    assert {tuple(sorted(other.split(", "))) for other in others} == {("maki", "star plate", "tuna", "two")}
    assert all(other.startswith("star plate, ") for other in others)


def test_the_mask_is_black_where_the_stamp_is_and_nothing_else_of_a_photo_is_changed():
    picture = draw(SCENE)
    changed = np.any(np.asarray(photos.stamped(picture)) != np.asarray(picture), axis=-1)
    black = np.asarray(photos.mask()) == 0
    assert changed.any() and black[changed].all() and black.mean() < 0.1
    covered = np.asarray(photos.without_stamp(photos.stamped(picture)))
    assert np.array_equal(covered, np.asarray(photos.without_stamp(picture)))


def test_no_photo_shows_a_scene_that_is_asked_for():
    trained = set(photos.STAR.training_scenes()) | set(photos.known_scenes(photos.PRIOR, start=photos.PRIOR_FROM))
    for drawn in (each for study in DRAWN.values() for each in study.values()):
        assert not trained & set(drawn.scenes)
        assert len(set(drawn.prompts)) == len(drawn.scenes)
