"""Several sets of images as one: their names, problems, resolutions and crops."""

from __future__ import annotations

import numpy as np
import pytest
from drawn_pictures import picture

from sushi_research.data.merged_sets import folder_names
from sushi_research.errors import UserError


def test_names_of_sets_tell_them_apart():
    assert folder_names(["/x/photos", "/y/photos", "class", "/x/photos"]) == [
        "x/photos",
        "y/photos",
        "class",
        "x/photos",
    ]
    assert folder_names(["a/b/c", "c"])[0].endswith("b/c")
    assert folder_names(["org/cats"]) == ["cats"]


def test_problems_and_samples_say_their_set(read, tmp_path):
    for number in range(3):
        picture(tmp_path / "photos" / f"{number}.png", number)
        picture(tmp_path / "class" / f"{number}.png", 10 + number)
    (tmp_path / "class" / "1.png").write_bytes(b"")
    sets = [{"path": str(tmp_path / name)} for name in ("photos", "class")]
    with pytest.raises(UserError, match=r"^1 problem in .*/photos, .*/class: class/1\.png \(the file is empty\)"):
        read(data={"path": None, "sets": sets})
    data = read(on_bad_file="skip", data={"path": None, "sets": sets})
    names = ["class/0.png", "class/2.png", "photos/0.png", "photos/1.png", "photos/2.png"]
    assert sorted(sample.name for sample in data.items.used) == names and read.report["used"] == names
    assert [sample.set for sample in data.items.used] == [int(each.startswith("c")) for each in _names(data.items)]
    assert all(sample.read() for sample in data.items.used)
    assert read.report["sets"] == [
        {"path": str(tmp_path / "photos"), "images": 3, "problems": 0},
        {"path": str(tmp_path / "class"), "images": 2, "problems": 1},
    ]
    for number in (0, 2):
        (tmp_path / "class" / f"{number}.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"^no image in .*/class can be used"):
        read(on_bad_file="skip", data={"path": None, "sets": sets})


def _names(items) -> list[str]:
    return [sample.name for sample in items.used]


def test_each_image_is_used_at_each_resolution_that_it_is_large_enough_for(read, tmp_path):
    picture(tmp_path / "photos" / "large.png", 0, size=(256, 256))
    picture(tmp_path / "photos" / "small.png", 1, size=(80, 80))
    data = read(data={"resolutions": [192, 64]})
    found = [(item.sample.name, item.bucket, item.instance) for item in data.items]
    expected = [("large.png", (64, 64), 0), ("large.png", (192, 192), 1), ("small.png", (64, 64), 0)]
    assert sorted(found) == expected
    assert "too small for one of the resolutions 64, 192, and used at the others: small.png" in data.notes
    held = read(data={"resolutions": [192, 64]}, held_out=0.5)
    assert len(held.held_out) == 1 and held.held_out[0].bucket in {(192, 192), (64, 64)}
    # What is measured is measured once, at its highest resolution.
    assert {"large.png": 192, "small.png": 64}[held.held_out[0].sample.name] == held.held_out[0].bucket[0]


def test_random_crops_are_spread_over_what_is_cut_away(read, tmp_path):
    picture(tmp_path / "photos" / "wide.png", 0, size=(160, 64))
    picture(tmp_path / "photos" / "square.png", 1, size=(64, 64))
    picture(tmp_path / "photos" / "held.png", 2, size=(160, 64))
    data = read(data={"crop": "random", "crops": 4, "bucket_min_side": 64, "bucket_max_side": 64}, held_out=0.34)
    assert data.items.most_crops == 4
    lefts = {}
    for crop in data.items.every_crop():
        for item in crop:
            geometry = item.geometry
            assert 0 <= geometry.crop_left <= geometry.resized_width - geometry.width
            lefts.setdefault(item.sample.name, []).append(geometry.crop_left)
    for name, places in lefts.items():
        # One in each quarter of the 97 places.
        expected = [0, 1, 2, 3] if name != "square.png" else [0] * 4
        assert [place * 4 // 97 for place in places] == expected, name
    # Those that are measured are cropped at the center.
    for item in [*data.held_out, *data.trained]:
        assert item.geometry.crop_left == (item.geometry.resized_width - item.geometry.width) // 2
    # The entries of the cache: each crop once, and the measured ones.
    count = sum(len(items) for items, _ in data.encodings())
    assert count == 4 * len(data.items) + len(data.held_out) + len(data.trained)


def test_a_squeezed_image_says_by_how_much(read, tmp_path):
    picture(tmp_path / "photos" / "wide.png", 0, size=(160, 64))
    picture(tmp_path / "photos" / "square.png", 1, size=(64, 64))
    data = read(data={"crop": "none", "bucket_min_side": 64, "bucket_max_side": 64})
    assert data.notes[1:] == ["squeezed by more than 20% to fit a bucket: wide.png (150%)"]
    assert {item.geometry.cut_away for item in data.items} == {0.0}


def test_regularisation_images_are_neither_held_out_nor_measured(read, tmp_path):
    for number in range(6):
        picture(tmp_path / "photos" / f"{number}.png", number)
        picture(tmp_path / "class" / f"{number}.png", 10 + number)
    sets = [{"path": str(tmp_path / "photos")}, {"path": str(tmp_path / "class"), "role": "regularisation"}]
    data = read(data={"path": None, "sets": sets}, held_out=0.5)
    assert len(data.held_out) == len(data.trained) == 3
    assert all(item.sample.set == 0 for item in [*data.held_out, *data.trained, *data.learned])
    # Three photos are trained on, so three class images are used, and a note says so.
    assert np.bincount(data.items.samples.sets[data.items.rows]).tolist() == [3, 3]
    assert any("3 of the 6 images of data.sets[1] are not used" in note for note in data.notes)
    # A set of class images can be measured as prior images, some of which are then held out.
    prior = read(data={"path": None, "sets": sets}, held_out=0.5, prior_path=str(tmp_path / "class"))
    assert {item.sample.set for item in prior.prior} == {1} and len(prior.prior) == 2
