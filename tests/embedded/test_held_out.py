"""The demo's held-out pictures are those that its code draws, and none of them is trained on."""

import numpy as np
import pytest
from PIL import Image

from demo.concepts import CONCEPTS
from demo.held_out import COUNT, FOLDER, PRIOR, write_held_out, write_prior
from sushi_research.data import near_duplicates


def captions(folder):
    return {path.read_text() for path in folder.glob("*.txt")}


@pytest.mark.parametrize("name", [*CONCEPTS, "prior"])
def test_the_pictures_in_the_repository_are_those_that_the_code_draws(tmp_path, name):
    if name == "prior":
        write_prior(tmp_path / name)
    else:
        write_held_out(CONCEPTS[name], tmp_path / name)
    written = {path.name: path for path in (tmp_path / name).iterdir()}
    stored = {path.name: path for path in (FOLDER / name).iterdir()}
    assert written.keys() == stored.keys() and len(stored) == 2 * (PRIOR if name == "prior" else COUNT)
    for name, path in stored.items():
        if path.suffix == ".txt":
            assert path.read_text() == written[name].read_text()
        else:
            # Pixels, not bytes: another zlib compresses otherwise.
            assert np.array_equal(np.asarray(Image.open(path)), np.asarray(Image.open(written[name]))), name


def test_no_prior_picture_is_of_a_scene_that_is_trained_on():
    trained = set().union(*(captions(FOLDER.parent / "photos" / name / "prior") for name in CONCEPTS))
    assert len(trained) == 32 and not captions(FOLDER / "prior") & trained and len(captions(FOLDER / "prior")) == PRIOR


def test_no_held_out_picture_is_a_photo_or_like_one():
    photos = FOLDER.parent / "photos/star"
    assert not captions(FOLDER / "star") & captions(photos) and captions(photos)
    fingerprints = {
        f"{folder.parent.name} {path.name}": near_duplicates.fingerprint(np.asarray(Image.open(path).convert("RGB")))
        for folder in (photos, FOLDER / "star")
        for path in folder.glob("*.*")
        if path.suffix != ".txt"
    }
    assert len(fingerprints) == COUNT + 16
    for group in near_duplicates.near_duplicate_groups(fingerprints):
        assert len({name.split()[0] for name in group}) == 1, group
