"""Names of images as captions, metadata and tables write them: in any Unicode form, and what is said of near misses."""

import json
import os
import tracemalloc
from io import BytesIO
from pathlib import Path
from unicodedata import normalize

import pytest
from PIL import Image

from sushi_research.data import names
from sushi_research.data.folder_files import list_files
from sushi_research.data.found import CaptionRule
from sushi_research.data.image_folder import find_in_folder
from sushi_research.data.images import BadImage
from sushi_research.data.names import Names, in_any_form
from sushi_research.data.scan import Scan
from sushi_research.data.tables import read_image
from sushi_research.remembered import NOTHING_REMEMBERED

COMPOSED, DECOMPOSED = normalize("NFC", "ガーデン"), normalize("NFD", "ガーデン")
MIXED = normalize("NFC", "ガ") + normalize("NFD", "ーデン")


def picture(path: Path, colour: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (colour, 0, 0)).save(path)


def find(
    root: Path, entries: dict[str, str] | None = None, folder: str = ""
) -> tuple[dict[str, str], dict[str, str], Scan]:
    """(captions, problems, scan) of a folder, after writing a metadata.jsonl into one of its folders."""
    if entries is not None:
        text = "\n".join(json.dumps({"file_name": name, "text": text}) for name, text in entries.items())
        (root / folder / "metadata.jsonl").write_text(text, encoding="utf-8")
    result = Scan(source=str(root))
    found = find_in_folder(result, list_files(result, root, {}), CaptionRule("text"), NOTHING_REMEMBERED)
    problems = {problem.name: problem.reason for problem in result.problems}
    captions = zip(found.names.to_pylist(), found.captions.to_pylist(), strict=True)
    return {name: lines[0] for name, lines in captions if lines}, problems, result


@pytest.mark.parametrize(
    "written", ["train/a.png", "photos/train/a.png", "C:\\photos\\a.png", "/data/train/a.png", "../train2/a.png"]
)
def test_a_name_that_counts_from_elsewhere_is_one_problem_with_the_rule(tmp_path, written):
    picture(tmp_path / "train" / "a.png")
    captions, problems, _ = find(tmp_path, {written: "salmon"}, "train")
    rule = "and file_name counts from the folder of its metadata.jsonl: write a.png"
    assert captions == {} and problems == {
        "train/a.png": f"no caption: train/metadata.jsonl line 1 has {written}, {rule}"
    }


@pytest.mark.parametrize(
    "written",
    ["sub\\b.png", "SUB/B.PNG", "sub/b", "sub/b.jpg", "sub%2Fb.png", "b.png", "ｓub/ｂ.png", "sub/b.png."],
)
def test_near_misses_are_named(tmp_path, written):
    picture(tmp_path / "sub" / "b.png")
    assert find(tmp_path, {written: "salmon"})[1]["sub/b.png"].endswith(": write sub/b.png")


def test_spaces_at_the_ends_are_shown_and_a_typing_error_is_found_among_images_without_caption(tmp_path):
    for name in ("salmon", "tuna", "img_12", "img_13"):
        picture(tmp_path / f"{name}.png")
    entries = {"salmon.png ": "s", "tunna.png": "t", "img_12.png": "12", "img_13.png": "13", "img_14.png": "gone"}
    _, problems, _ = find(tmp_path, entries)
    assert 'line 1 has "salmon.png "' in problems["salmon.png"]
    assert "line 2 has tunna.png" in problems["tuna.png"] and problems["tuna.png"].endswith("write tuna.png")
    assert "did you mean" not in problems["metadata.jsonl line 5"], "img_13.png has a caption"


def test_a_near_miss_of_an_image_that_has_a_caption_is_a_problem_of_its_line(tmp_path):
    picture(tmp_path / "a.png")
    _, problems, _ = find(tmp_path, {"a.png": "one", "A.png": "two"})
    assert problems == {
        "metadata.jsonl line 2": "A.png is not among the images here; file_name counts from the folder of its "
        "metadata.jsonl (did you mean a.png?)"
    }


def test_names_that_are_right_are_used(tmp_path):
    for name in ("a.png", "sub/b.png", "with\\back.png", "50%25.png"):
        picture(tmp_path / name)
    captions, problems, _ = find(
        tmp_path, {"./a.png": "a", "sub//b.png": "b", "with\\back.png": "c", "sub/../50%25.png": "d"}
    )
    assert problems == {} and set(captions.values()) == {"a", "b", "c", "d"}


@pytest.mark.parametrize("image", [COMPOSED, DECOMPOSED, MIXED])
@pytest.mark.parametrize("other", [COMPOSED, DECOMPOSED, MIXED])
@pytest.mark.parametrize("folder", ["", "sub_é/"])
def test_captions_match_in_any_unicode_form(tmp_path, image, other, folder):
    picture(tmp_path / normalize("NFD", folder) / f"{image}.png")
    name = f"{normalize('NFD', folder)}{image}.png"
    (tmp_path / normalize("NFD", folder) / f"{other}.txt").write_text("salmon")
    captions, problems, scan = find(tmp_path, {f"{normalize('NFC', folder)}{other}.png": "salmon"})
    assert (captions, problems, scan.notes) == ({name: "salmon"}, {}, []), "and the name is as it is on the disk"


def test_files_that_differ_only_in_their_form_are_two(tmp_path):
    picture(tmp_path / f"{COMPOSED}.png")
    picture(tmp_path / f"{DECOMPOSED}.png")
    if len(os.listdir(tmp_path)) == 1:
        pytest.skip("this file system knows one form only")
    for form in (COMPOSED, DECOMPOSED):
        (tmp_path / f"{form}.txt").write_text(f"{len(form)}")
    assert find(tmp_path)[0] == {f"{form}.png": f"{len(form)}" for form in (COMPOSED, DECOMPOSED)}
    for form in (COMPOSED, DECOMPOSED):
        (tmp_path / f"{form}.txt").unlink()
    (tmp_path / f"{MIXED}.txt").write_text("whose?")
    captions, problems, _ = find(tmp_path, {f"{MIXED}.png": "whose?"})
    assert captions == {}
    assert "fits 2 images whose names differ only in their Unicode form" in problems.pop("metadata.jsonl line 1")
    assert all(f"{MIXED}.txt fits 2 images" in reason for reason in problems.values()) and len(problems) == 2


def test_captions_that_differ_for_one_name_in_two_forms(tmp_path):
    picture(tmp_path / f"{COMPOSED}.png")
    (tmp_path / f"{COMPOSED}.txt").write_text("one")
    (tmp_path / f"{DECOMPOSED}.txt").write_text("two")
    if len(os.listdir(tmp_path)) == 2:
        pytest.skip("this file system knows one form only")
    assert find(tmp_path)[1][f"{COMPOSED}.png"].endswith("names that differ only in their Unicode form")


@pytest.mark.parametrize("stray", ["A.txt", "a.png.txt", "a .caption", "captions/a.txt"])
def test_a_caption_file_of_nearly_the_same_name_is_named(tmp_path, stray):
    picture(tmp_path / "a.png")
    (tmp_path / stray).parent.mkdir(exist_ok=True)
    (tmp_path / stray).write_text("salmon")
    assert find(tmp_path)[1] == {
        "a.png": f"no caption: there is no a.txt, a.caption or entry in a metadata.jsonl (there is {stray})"
    }


def test_metadata_that_is_not_read_is_named(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,salmon\n")
    assert find(tmp_path)[1]["a.png"].endswith("(metadata.csv is not read: write a metadata.jsonl)")


def test_metadata_of_another_kind_of_file_is_one_short_story(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text("x\n" * 100_000)
    problems = find(tmp_path)[1]
    assert (
        len(problems) == 101
        and problems["metadata.jsonl"] == "none of the first 100 lines is an entry, and the others are not read"
    )
    (tmp_path / "metadata.jsonl").write_text("[" * 2**21 + "\n" + json.dumps({"file_name": "a.png", "text": "salmon"}))
    captions, problems, _ = find(tmp_path)
    assert captions == {"a.png": "salmon"}
    assert problems == {"metadata.jsonl line 1": "is longer than 1,048,576 letters: remove it"}
    (tmp_path / "metadata.jsonl").unlink()
    os.mkfifo(tmp_path / "metadata.jsonl")
    assert find(tmp_path)[1]["metadata.jsonl"].startswith("is a FIFO")


def test_the_image_of_a_row_is_found_in_any_form_and_nowhere_else(tmp_path):
    own, other = tmp_path / "set", tmp_path / "other"
    for folder in (own / DECOMPOSED, other):
        picture(folder / f"{DECOMPOSED}.png")
    name = f"{COMPOSED}/{MIXED}.png"
    assert Image.open(BytesIO(read_image({"bytes": None, "path": name}, (own,)))).size == (8, 8)
    assert in_any_form(own, f"{COMPOSED}/gone.png") == own / DECOMPOSED / "gone.png"
    with pytest.raises(BadImage, match="outside of the data set"):
        read_image({"bytes": None, "path": f"../other/{COMPOSED}.png"}, (own,))


def test_thousands_of_near_misses_take_no_time(monkeypatch):
    """One index serves all: nothing is compared with every image."""
    parsed = []
    real = names._loose_parts
    monkeypatch.setattr(names, "_loose_parts", lambda name: parsed.append(name) or real(name))
    images = Names(f"{number}/0.png" for number in range(1000))
    for number in range(1000):
        assert images.near(f"elsewhere/{number}/0.PNG", "") == [f"{number}/0.png"]
    assert len(parsed) == 2000
    assert len(images.near("0.png", "")) == 100


def test_a_name_below_thousands_of_folders_takes_little_memory():
    """A hostile line can have 500,000: without a bound their number counts squared."""
    images = Names(["sub/a.png"])
    assert images.near("a.png", "") == ["sub/a.png"]
    tracemalloc.start()
    try:
        assert images.near("x/" * 5000 + "sub/a.png", "") == ["sub/a.png"]
        assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    finally:
        tracemalloc.stop()


def test_a_caption_that_is_too_long_is_not_called_no_text(tmp_path):
    picture(tmp_path / "a.png")
    _, problems, _ = find(tmp_path, {"a.png": "tuna " * 20_000})
    assert problems["a.png"] == "no caption but that of metadata.jsonl line 1, which is too long"
    assert "has 100,000 letters" in problems["metadata.jsonl line 1"]
