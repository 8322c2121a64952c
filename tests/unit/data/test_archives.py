"""Tar files in WebDataset's form are tables; other archives are named, with what to do."""

import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sushi_research.data import dataset
from sushi_research.errors import UserError
from sushi_research.remembered import Remembered


def image(number: int, kind: str = "png") -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, {"png": "PNG", "jpg": "JPEG"}[kind])
    return buffer.getvalue()


def write_tar(path: Path, kinds: list[str]) -> None:
    """A sample for each kind of image: image, caption, and a box in a json."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, kind in enumerate(kinds):
            parts = {kind: image(number, kind), "txt": f"caption {number}".encode()}
            for suffix, data in (parts | {"json": json.dumps({"stars": number}).encode()}).items():
                entry = tarfile.TarInfo(f"sub/{number}.{suffix}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))


@pytest.fixture
def scan(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")

    def run(path: Path, **columns: str) -> dataset.Scan:
        columns = {"image_column": "image", "caption_column": "text"} | columns
        remembered = Remembered(tmp_path / "remembered")
        return dataset.scan(path, split="train", revision=None, remembered=remembered, show_progress=False, **columns)

    return run


def test_tar_files_are_a_table(scan, tmp_path):
    folder = tmp_path / "tars"
    write_tar(folder / "000.tar", ["png", "png"])
    write_tar(folder / "001.tar", ["png"])
    result = scan(folder, image_column="png", caption_column="txt")
    assert sorted(sample.caption for sample in result.samples) == ["caption 0", "caption 0", "caption 1"]
    assert {(sample.width, sample.height) for sample in result.samples} == {(60, 40)}
    assert min(len(sample.read()) for sample in result.samples) > 1000
    with pytest.raises(UserError, match=r"has no column image: set data.image_column to one of png, txt, json"):
        scan(folder)


def test_a_tar_that_is_no_table_says_what_to_do(scan, tmp_path):
    write_tar(tmp_path / "tars" / "000.tar", ["png", "jpg"])
    with pytest.raises(UserError, match=r"could not be loaded .* \(WebDataset\): otherwise unpack it\.$"):
        scan(tmp_path / "tars")


def test_other_archives_are_named(scan, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    with zipfile.ZipFile(folder / "all.zip", "w") as archive:
        archive.writestr("a.png", image(0))
    with pytest.raises(UserError, match=r"holds no image \(all\.zip: an archive, which is not read: unpack it\)\.$"):
        scan(folder)
    with pytest.raises(
        UserError, match=r"all\.zip is an archive, which is not read: unpack it, and give the folder\.$"
    ):
        scan(folder / "all.zip")
    (folder / "a.png").write_bytes(image(0))
    (folder / "a.txt").write_text("a")
    assert "all.zip: an archive, which is not read: unpack it" in scan(folder).notes
