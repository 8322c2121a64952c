"""The demo's held-out pictures are those that its code draws, and none of them is trained on."""

import numpy as np
from PIL import Image

from demo.concepts import CONCEPTS
from demo.held_out import COUNT, FOLDER, write_held_out
from sushi_research.data import near_duplicates


def captions(folder):
    return {path.read_text() for path in folder.glob("*.txt")}


def test_the_pictures_in_the_repository_are_those_that_the_code_draws(tmp_path):
    write_held_out(CONCEPTS["star"], tmp_path / "star")
    written = {path.name: path for path in (tmp_path / "star").iterdir()}
    stored = {path.name: path for path in (FOLDER / "star").iterdir()}
    assert written.keys() == stored.keys() and len(stored) == 2 * COUNT
    for name, path in stored.items():
        if path.suffix == ".txt":
            assert path.read_text() == written[name].read_text()
        else:
            # Pixels, not bytes: another zlib compresses otherwise.
            assert np.array_equal(np.asarray(Image.open(path)), np.asarray(Image.open(written[name]))), name


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
