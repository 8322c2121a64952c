"""The data study: its photos and captions, and that its page is of the recorded runs and these files."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from demo import records
from demo.data_study import page, photos, results
from demo.data_study.scores import DRAWN, SCORES
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


@pytest.mark.parametrize("name", results.NAMES)
def test_every_run_is_recorded_with_every_score(name):
    study = results.studies()[name]
    scores = study.scores()
    assert set(scores) == set(SCORES[name])
    for score, of in scores.items():
        scenes = DRAWN[name][SCORES[name][score].drawn].scenes
        assert list(of) == list(study.variants)
        assert all(right.shape == (len(study.seeds), len(scenes)) for right in of.values())
    assert Image.open(page.picture_of(study)).width > 500


def test_the_page_claims_what_the_recorded_runs_show():
    text = (results.FOLDER / "data.md").read_text()
    assert page.claims()
    for claim in page.claims():
        assert f"- {claim}\n" in text
    for study in results.studies().values():
        for row in page.table(study):
            assert f"| {' | '.join(row)} |\n" in text


def test_the_recorded_runs_are_of_these_files():
    recorded = json.loads(results.INPUTS.read_text())
    changed = records.differences(recorded, records.dependencies(results.inputs()), "inputs")
    assert not changed, f"train the experiments tags and stamp again, then python -m demo.data_study: {changed} changed"
