"""Reading the data of a config: two folders with names of their own, and what is said of each."""

from __future__ import annotations

import pytest
from drawn_pictures import picture

from sushi_research.errors import UserError


def names(items) -> list[str]:
    return sorted({item.sample.name for item in items})


def test_a_name_in_one_folder_says_nothing_of_the_other(read, tmp_path):
    for number, name in enumerate(("a", "b", "c")):
        picture(tmp_path / "photos" / f"{name}.png", number)
        picture(tmp_path / "held" / f"{name}.png", 10 + number)
    picture(tmp_path / "held" / "a.png", 10, size=(20, 20))
    (tmp_path / "held" / "b.png").write_bytes(b"")
    (tmp_path / "held" / "orphan.txt").write_text("x")
    held = str(tmp_path / "held")
    with pytest.raises(UserError, match=rf"^2 problems in {held}: a\.png \(20x20 .*, b\.png \(the file is empty\)"):
        read(path=held)
    for data in (None, read(on_bad_file="skip", path=held)):
        assert read.report["used"] == ["a.png", "b.png", "c.png"] and read.report["problems"] == []
        other = read.report["evaluation"]
        assert (other["source"], other["used"]) == (held, ["c.png"])
        assert [problem["name"] for problem in other["problems"]] == ["a.png", "b.png"]
        assert other["notes"] == ["orphan.txt: a caption without an image"]
        if data:
            assert (names(data.items), names(data.held_out)) == (["a.png", "b.png", "c.png"], ["c.png"])
            assert [problem.name for problem in data.problems] == ["evaluation.path: a.png", "evaluation.path: b.png"]
            assert data.notes[-1] == "evaluation.path: orphan.txt: a caption without an image"


def test_too_small_an_image_for_training_leaves_its_namesake_in_the_validation_set(read, tmp_path):
    picture(tmp_path / "photos" / "a.png", 0, size=(20, 20))
    picture(tmp_path / "photos" / "b.png", 1)
    picture(tmp_path / "held" / "a.png", 2)
    data = read(on_bad_file="skip", path=str(tmp_path / "held"))
    assert (names(data.items), names(data.held_out)) == (["b.png"], ["a.png"])
    with pytest.raises(UserError, match="evaluation.path: .* holds no image"):
        (tmp_path / "none").mkdir()
        read(path=str(tmp_path / "none"))


def test_the_share_is_of_the_images_that_can_be_used(read, tmp_path):
    for number in range(20):
        picture(tmp_path / "photos" / f"{number:02d}.png", number)
    for number in range(20, 30):
        picture(tmp_path / "photos" / f"{number}.png", number, size=(20, 20))
    data = read(on_bad_file="skip", held_out=0.2)
    assert (len(names(data.items)), len(names(data.held_out)), len(data.scan.problems)) == (16, 4, 10)


def test_own_folders_and_large_crops_are_noted(read, tmp_path):
    picture(tmp_path / "photos" / "wide.png", 0, size=(640, 64))
    picture(tmp_path / "photos" / "square.png", 1)
    (tmp_path / "photos" / "cache").mkdir()
    picture(tmp_path / "photos" / "cache" / "x.png", 2)
    data = read()
    assert names(data.items) == ["square.png", "wide.png"]
    assert data.notes == [
        "cache: the cache folder, skipped",
        "runs/a: the run folder, skipped",
        "1 image loses more than 20% to the crop that fits a bucket: wide.png (60%, to 128x32)",
    ]


def test_repeats_in_the_name_of_the_folder_itself_are_noted(read, tmp_path):
    picture(tmp_path / "10_cat" / "a.png", 0)
    for path, count in ((tmp_path, 10), (tmp_path / "10_cat", 1)):
        data = read(data={"path": str(path)})
        noted = [note for note in data.notes if "the number in its name is not used" in note]
        assert (len(data.items), len(noted)) == (count, count == 1)


def test_what_is_for_hf_datasets_is_refused_for_image_files(read, tmp_path):
    picture(tmp_path / "photos" / "a.png", 0)
    picture(tmp_path / "held" / "b.png", 1)
    held = str(tmp_path / "held")
    for given, evaluation in (
        ({"split": "test"}, {}),
        ({"image_column": "picture"}, {"path": held}),
        ({}, {"path": held, "split": "test"}),
    ):
        key = next(iter([f"data.{name}" for name in given]), "evaluation.split")
        with pytest.raises(
            UserError, match=rf"^{key} is \w+, which has no effect: .* holds image files.*or set it to "
        ):
            read(data=given, **evaluation)
    assert names(read(data={"caption_column": "words"}).items) == ["a.png"]
