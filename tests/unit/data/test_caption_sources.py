"""Where captions are from: files, the names of folders and files, or nowhere."""

import pytest
from PIL import Image

from sushi_research.data import dataset
from sushi_research.errors import UserError
from sushi_research.remembered import NOTHING_REMEMBERED


@pytest.fixture
def scan(tmp_path):
    for number, name in enumerate(("10_sks person/a b.png", "10_sks person/deep/c.png", "2024/d.png", "e.png")):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(path)
    (tmp_path / "photos" / "e.txt").write_text("from a file")
    (tmp_path / "photos" / "2024" / "d.txt").write_text(" \n")

    def run(path=tmp_path / "photos", **options):
        columns = {"split": "train", "image_column": "image", "caption_column": "text", "revision": None}
        result = dataset.scan(path, **columns, remembered=NOTHING_REMEMBERED, show_progress=False, **options)
        return {sample.name: sample.captions for sample in result.samples}, result

    return run


def test_the_folder_or_the_name_is_the_caption(scan):
    captions, result = scan(caption_source="folder")
    assert captions == {
        "10_sks person/a b.png": ("sks person",),
        "10_sks person/deep/c.png": ("deep",),
        "2024/d.png": ("2024",),
        "e.png": ("photos",),
    }
    assert result.notes == ["2 caption files are not read, because captions.source is folder"]
    captions, _ = scan(caption_source="name")
    assert sorted(captions.values()) == [("a b",), ("c",), ("d",), ("e",)]


def test_images_without_a_caption_are_used_if_asked_for(scan):
    captions, result = scan()
    assert captions == {"e.png": ("from a file",)} and len(result.problems) == 3
    captions, result = scan(allow_empty=True)
    assert captions == {
        "10_sks person/a b.png": ("",),
        "10_sks person/deep/c.png": ("",),
        "2024/d.png": ("",),
        "e.png": ("from a file",),
    }
    assert len(result.problems) == 0


def test_rows_have_no_folders(scan, tmp_path):
    import datasets

    datasets.disable_progress_bars()
    data = (tmp_path / "photos" / "e.png").read_bytes()
    cells = [{"bytes": data, "path": None}] * 3
    rows = datasets.Dataset.from_dict({"image": cells, "text": [["one", "two\nthree"], [""], None]})
    rows.cast_column("image", datasets.Image()).save_to_disk(str(tmp_path / "set"))
    captions, _ = scan(tmp_path / "set", allow_empty=True)
    assert captions == {"train[0]": ("one", "two", "three"), "train[1]": ("",), "train[2]": ("",)}
    with pytest.raises(UserError, match="captions.source is folder, but .* is an HF dataset"):
        scan(tmp_path / "set", caption_source="folder")
