"""crop: box: the part of each image that is used, from metadata.jsonl files or a column."""

import json

import pytest
from drawn_pictures import picture

from sushi_research.errors import UserError

BOX = {"crop": "box", "bucket_min_side": 32}


def write(folder, lines: list[dict], captions: bool = True) -> None:
    """Three pictures of 128x96 pixels, and the metadata."""
    for number, name in enumerate("abc"):
        picture(folder / f"{name}.png", number, size=(128, 96))
        if not captions:
            (folder / f"{name}.txt").unlink()
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_boxes_of_a_folder(read, tmp_path):
    """The lines need no caption if the images have caption files; numbers are rounded to pixels."""
    boxes = {"a": [64, 0, 128, 64], "b": [0.2, 15.8, 63.9, 96], "c": [10, 10, 110, 60]}
    write(tmp_path / "photos", [{"file_name": f"{name}.png", "crop": box} for name, box in boxes.items()])
    data = read(data=BOX)
    found = {item.sample.name: (item.sample.box, item.geometry) for item in data.items}
    assert {name: box for name, (box, _) in found.items()} == {
        "a.png": (64, 0, 128, 64),
        "b.png": (0, 16, 64, 96),
        "c.png": (10, 10, 110, 60),
    }
    # A square of the size of its bucket: not scaled, and cut where the box is.
    geometry = found["a.png"][1]
    assert (geometry.width, geometry.height, geometry.crop_left, geometry.crop_top) == (64, 64, 64, 0)
    assert (geometry.resized_width, geometry.resized_height) == (128, 96)
    assert (geometry.time_ids(False, "image"), geometry.time_ids(True, "image")) == (
        (96, 128, 0, 64, 64, 64),
        (96, 128, 0, 0, 64, 64),
    )
    assert data.scan.cropped == []


def test_images_without_a_usable_box_are_problems(read, tmp_path):
    lines = [{"file_name": "a.png", "crop": [64, 0, 129, 64], "text": "a"}]
    lines += [{"file_name": "b.png", "crop": [1, 2, 3], "text": "b"}, {"file_name": "c.png", "text": "c"}]
    write(tmp_path / "photos", lines, captions=False)
    with pytest.raises(UserError, match="^no image in"):
        read(data=BOX)
    lines[0]["crop"] = [0, 0, 64, 64]
    write(tmp_path / "photos", lines, captions=False)
    data = read(data=BOX, on_bad_file="skip")
    hint = "write crop in a metadata.jsonl as [left, top, right, bottom] in pixels"
    assert {problem.name: problem.reason for problem in data.problems} == {
        "b.png": f"its box is [1, 2, 3]: {hint}",
        "c.png": f"no box: {hint}",
    }
    assert [item.sample.name for item in data.items] == ["a.png"]
    lines[0]["crop"] = [64, 0, 129, 64]
    lines[1]["crop"] = [20, 0, 20, 10]
    lines[2]["crop"] = [0, 0, 10, 10]
    write(tmp_path / "photos", lines, captions=False)
    with pytest.raises(UserError) as caught:
        read(data=BOX)
    assert "its box [64, 0, 129, 64] is not within its 128x96 pixels" in str(caught.value)
    assert "its box [20, 0, 20, 10] has no area" in str(caught.value)
    assert "its box of 10x10 pixels is too small: without data.upscale" in str(caught.value)
