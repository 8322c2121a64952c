"""Masks are found by name, column or transparency, belong to the right image, and what cannot be used is a problem by name."""

import datasets
import numpy as np
import pytest
from PIL import Image

from sushi_research.config.masks import MaskSection
from sushi_research.data import checking, dataset, mask_scan, masks
from sushi_research.errors import UserError
from sushi_research.fingerprints import content_hash
from sushi_research.remembered import Remembered


def draw(path, number=0, size=(40, 30), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(1, 255, (*size[::-1], 4), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


@pytest.fixture
def photos(tmp_path):
    """A folder of four images with captions: a, b, sub/a and, with transparency, c."""
    folder = tmp_path / "photos"
    for number, name in enumerate(("a.png", "b.jpg", "sub/a.png", "c.png")):
        draw(folder / name, number, mode="RGBA" if name == "c.png" else "RGB")
        (folder / name).with_suffix(".txt").write_text(f"caption {number}")
    return folder


@pytest.fixture
def scan(tmp_path, photos):
    def run(path=photos, **settings):
        masks = MaskSection(**settings)
        return dataset.scan(
            path,
            split="train",
            image_column="image",
            caption_column="text",
            revision=None,
            remembered=Remembered(tmp_path / "remembered"),
            show_progress=False,
            masks=masks,
        )

    return run


def read(result):
    """(the mask of each sample by its name, the reason of each problem by name)."""
    found = {sample.name: sample.read_mask() for sample in result.samples}
    return found, {problem.name: problem.reason for problem in result.problems}


def test_masks_next_to_images_are_theirs_and_no_images(scan, photos):
    files = {
        "a.png": draw(photos / "a-masklabel.png", 11, mode="L"),
        "b.jpg": draw(photos / "b.mask.webp", 12, mode="L"),
        "sub/a.png": draw(photos / "sub/a_mask.jpg", 13, mode="L"),
        "c.png": draw(photos / "c_mask.png", 14, mode="L"),
    }
    expected = {name: path.read_bytes() for name, path in files.items()}
    result = scan(source="files")
    assert read(result) == (expected, {})
    assert [sample.mask_hash for sample in result.samples] == [
        content_hash(expected[sample.name]) for sample in result.samples
    ]
    # Without masks they are images without captions, and the message says what they may be.
    reasons = {problem.name: problem.reason for problem in scan().problems}
    assert set(reasons) == {path.relative_to(photos).as_posix() for path in files.values()}
    assert all(reason.endswith("(is it a mask? set masks.source to files)") for reason in reasons.values())


def test_what_is_remembered_is_used_until_it_changes(scan, photos, monkeypatch):
    for name in ("a", "b", "sub/a", "c"):
        draw(photos / f"{name}_mask.png", 11, mode="L")
    first, decoded = read(scan(source="files")), []
    inspect = checking.inspect
    monkeypatch.setattr(checking, "inspect", lambda image: decoded.append(image) or inspect(image))
    monkeypatch.setattr(mask_scan, "_match", None)  # not called again
    assert read(scan(source="files")) == first and decoded == []
    changed = draw(photos / "b_mask.png", 12, mode="L")
    again = scan(source="files")
    assert decoded == [str(changed)]
    assert read(again)[0]["b.jpg"] == changed.read_bytes()


def test_masks_that_cannot_be_used_are_problems_of_their_images(scan, photos):
    draw(photos / "a_mask.png", 1, size=(30, 40), mode="L")
    Image.new("L", (40, 30)).save(photos / "b_mask.png")
    (photos / "sub/a_mask.png").write_bytes(b"nothing")
    draw(photos / "c_mask.png", mode="RGBA")
    result = scan(source="files")
    assert len(result.samples) == 0
    assert read(result)[1] == {
        "a.png": "its mask has 30x40 pixels, and the image 40x30: a_mask.png",
        "b.jpg": "its mask is all black, so nothing would be learned: b_mask.png",
        "sub/a.png": "its mask cannot be used, not an image that Pillow can read as JPEG, PNG, WebP, AVIF, BMP, GIF or TIFF: "
        "sub/a_mask.png",
        "c.png": "its mask is transparent: save c_mask.png in black and white, without transparency",
    }
    Image.new("L", (40, 30), 255).save(photos / "b_mask.png")
    draw(photos / "a.mask.png", mode="L")
    (photos / "sub/a_mask.png").unlink()
    assert read(scan(source="files", invert=True))[1] == {
        "a.png": "several masks, a.mask.png, a_mask.png: keep one of them",
        "b.jpg": "its mask is all white, and masks.invert is on, so nothing would be learned: b_mask.png",
        "sub/a.png": "no mask: there is no sub/a-masklabel.png, sub/a.mask.png or sub/a_mask.png",
        "c.png": "its mask is transparent: save c_mask.png in black and white, without transparency",
    }


def test_masks_in_a_folder_have_the_names_of_their_images(scan, photos, tmp_path):
    """Also if that folder is among the images, which are then not searched there."""
    for folder in (tmp_path / "masks", photos / "masks"):
        names = {"a.png": "a.png", "b.jpg": "b-masklabel.png", "sub/a.png": "sub/a.webp"}
        expected = {
            name: draw(folder / mask, number, mode="L").read_bytes()
            for number, (name, mask) in enumerate(names.items())
        }
        found, problems = read(scan(source="files", folder=str(folder)))
        assert found == expected
        assert problems == {"c.png": f"no mask: there is no c.png in {folder}"}
    with pytest.raises(UserError, match="^masks.folder: there is no folder "):
        scan(source="files", folder=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="^masks.folder is the folder of the images"):
        scan(source="files", folder=str(photos))


def test_transparency_is_a_mask_of_every_image(scan, photos):
    note = "masks.source is alpha, but no image is transparent: the masks are white all over"
    result = scan(source="alpha")
    assert note not in result.notes
    assert len(result.samples) == 4 and not result.problems
    for sample in result.samples:
        assert sample.mask_hash == f"alpha:{sample.image_hash[6:]}" and sample.load_mask is None
        alpha = np.asarray(masks.alpha(sample.read_mask()))
        assert (alpha.min() < 255) == (sample.name == "c.png")
    (photos / "c.png").unlink(), (photos / "c.txt").unlink()
    assert note in scan(source="alpha").notes


def test_masks_in_a_column(scan, photos, tmp_path):
    cells = [Image.open(draw(photos / f"{number}.png", 20 + number, mode="L")) for number in range(3)]
    rows = {"image": cells, "mask": cells[::-1], "text": ["x", "y", "z"], "size": [1, 2, 3]}
    rows["mask"][1] = Image.new("L", (40, 30))
    table = datasets.Dataset.from_dict(rows)
    table = table.cast_column("image", datasets.Image()).cast_column("mask", datasets.Image())
    table.save_to_disk(tmp_path / "table")
    result = scan(tmp_path / "table", source="column")
    found, problems = read(result)
    assert problems == {"train[1]": "its mask is all black, so nothing would be learned: mask[1]"}
    assert found == {
        "train[0]": result.samples.sources[0](2), "train[2]": result.samples.sources[0](0),
    }  # fmt: skip
    for settings, sentence in (
        (
            {"source": "column", "column": "outline"},
            "has no column outline: set masks.column to one of image, mask, text, size",
        ),
        ({"source": "column", "column": "size"}, "the column size of .* holds no images: set masks.column to one of"),
        ({"source": "files"}, "is an HF dataset, which has no such masks: set it to column or alpha"),
    ):
        with pytest.raises(UserError, match=sentence):
            scan(tmp_path / "table", **settings)
    with pytest.raises(UserError, match="holds image files, which has no such masks: set it to files or alpha"):
        scan(source="column")
