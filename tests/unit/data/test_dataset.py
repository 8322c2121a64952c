import json
import os
import pickle
import struct
import time
import zlib
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from sushi_research import progress
from sushi_research.data import checking, dataset, inspecting
from sushi_research.data.colour import SRGB, matrix_profile
from sushi_research.data.dataset import require_clean, write_report
from sushi_research.data.samples import Sample
from sushi_research.data.scan import Problem, Scan
from sushi_research.errors import UserError
from sushi_research.fingerprints import content_hash
from sushi_research.remembered import Remembered
from sushi_research.user_files import UnreadableFile


def picture(colour: int, format: str = "PNG", size: tuple[int, int] = (12, 8), mode: str = "RGB", **options) -> bytes:
    """The file of a plain image; the colour tells one from another."""
    value = (colour, *[0] * (len(Image.new(mode, (1, 1)).getbands()) - 1))
    buffer = BytesIO()
    Image.new(mode, size, value if len(value) > 1 else colour).save(buffer, format, **options)
    return buffer.getvalue()


def bomb() -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"")
    chunks = [
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in (header, data)
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def write(root: Path, **files: bytes | str) -> Path:
    """Files an hour old, so that they are settled; `sub__a_png` is sub/a.png."""
    for key, content in files.items():
        name = key.replace("__", "/")
        stem, _, suffix = name.rpartition("_")
        path = root / f"{stem}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        settle(path)
    return root


def settle(path: Path) -> None:
    moment = time.time() - 3600
    os.utime(path, (moment, moment))


def lines(*entries: dict | str) -> str:
    return "\n".join(entry if isinstance(entry, str) else json.dumps(entry) for entry in entries)


@pytest.fixture
def root(tmp_path):
    return tmp_path / "photos"


@pytest.fixture
def remembered(tmp_path):
    return Remembered(tmp_path / ".cache" / "remembered")


@pytest.fixture
def scan(remembered):
    def run(path, **changes):
        arguments = {"split": "train", "image_column": "image", "caption_column": "text", "revision": None}
        return dataset.scan(path, **(arguments | {"remembered": remembered, "show_progress": False} | changes))

    return run


@pytest.fixture
def decodes(monkeypatch):
    """The bytes of every image that is decoded."""
    seen = []
    real = inspecting.decode_and_describe

    def counting(data):
        seen.append(data)
        return real(data)

    monkeypatch.setattr(inspecting, "decode_and_describe", counting)
    return seen


def captions(result: Scan) -> dict[str, str]:
    return {sample.name: sample.caption for sample in result.samples}


def problems(result: Scan) -> dict[str, str]:
    assert len({problem.name for problem in result.problems}) == len(result.problems), result.problems
    return {problem.name: problem.reason for problem in result.problems}


# --- a folder of images ---


def test_images_with_sidecars_in_nested_folders(root, scan):
    write(root, a_png=picture(1), a_txt="a cat", sub__deep__b_JPG=picture(2, "JPEG"), sub__deep__b_caption=" a dog \n")
    write(root, c_webp=picture(3, "WEBP"), c_txt=b"\xef\xbb\xbfa h\xc3\xa9ron", d_jpeg=picture(4, "JPEG"), d_txt="d")
    result = scan(root)
    expected = {"a.png": "a cat", "sub/deep/b.JPG": "a dog", "c.webp": "a h\u00e9ron", "d.jpeg": "d"}
    assert captions(result) == expected
    assert result.problems == [] and result.notes == [] and result.ignored == 0
    assert result.source == str(root)


def test_a_sample_holds_the_hash_the_upright_size_and_the_bytes(root, scan):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = picture(1, "JPEG", size=(12, 8), exif=exif)
    (sample,) = scan(write(root, a_jpg=data, a_txt="x")).samples
    assert (sample.width, sample.height) == (8, 12)
    assert sample.image_hash == content_hash(data)
    assert sample.repeats == 1
    assert sample.read() == data
    assert pickle.loads(pickle.dumps(sample)).read() == data


def test_samples_can_be_read_from_another_working_folder(root, scan, monkeypatch, tmp_path):
    write(root, a_png=picture(1), a_txt="x")
    monkeypatch.chdir(root.parent)
    (sample,) = scan("photos").samples
    monkeypatch.chdir(tmp_path.parent)
    assert sample.read() == picture(1)


def test_a_file_that_changes_after_the_scan_is_an_error_when_read(root, scan):
    (sample,) = scan(write(root, a_png=picture(1), a_txt="x")).samples
    write(root, a_png=picture(2))
    with pytest.raises(UserError, match=r"a\.png was changed"):
        sample.read()
    (root / "a.png").unlink()
    with pytest.raises(UserError, match=r"a\.png could be read before"):
        sample.read()


def test_two_images_may_share_a_sidecar(root, scan):
    write(root, a_png=picture(1), a_jpg=picture(1, "JPEG"), a_txt="both")
    assert captions(scan(root)) == {"a.png": "both", "a.jpg": "both"}


def test_metadata_jsonl_of_any_folder_names_files_below_it(root, scan):
    write(root, a_png=picture(1), sub__b_png=picture(2), sub__deep__c_png=picture(3))
    write(
        root,
        metadata_jsonl=lines({"file_name": "a.png", "text": " one "}, "", {"file_name": "./sub/b.png", "text": "two"}),
    )
    write(root, sub__metadata_jsonl="\ufeff" + lines({"file_name": "deep/c.png", "text": "three\u2028lines"}) + "\r\n")
    result = scan(root)
    assert captions(result) == {"a.png": "one", "sub/b.png": "two", "sub/deep/c.png": "three\u2028lines"}
    assert result.problems == []


def test_line_separators_within_a_json_string_do_not_end_the_line(root, scan):
    entry = json.dumps({"file_name": "a.png", "text": "one\u2028two"}, ensure_ascii=False)
    assert captions(scan(write(root, a_png=picture(1), metadata_jsonl=entry))) == {"a.png": "one\u2028two"}


def test_the_caption_key_of_metadata_may_be_the_configured_column(root, scan):
    write(root, a_png=picture(1), b_png=picture(2))
    write(
        root,
        metadata_jsonl=lines(
            {"file_name": "a.png", "text": "plain", "long": "full"}, {"file_name": "b.png", "text": "b"}
        ),
    )
    assert captions(scan(root, caption_column="long")) == {"a.png": "full", "b.png": "b"}
    assert captions(scan(root)) == {"a.png": "plain", "b.png": "b"}


def test_lines_of_metadata_that_are_not_sound_are_named(root, scan):
    write(root, a_png=picture(1), b_png=picture(2), c_psd=b"")
    write(
        root,
        metadata_jsonl=lines(
            {"file_name": "a.png", "text": "one"},
            "{",
            {"file_name": "gone.png", "text": "x"},
            {"file_name": "a.png", "text": "one"},
            {"text": "x"},
            "[1]",
            {"file_name": "b.png", "text": 3},
            {"file_name": "../photos/b.png", "text": "outside"},
            "[" * 100_000,
        ),
    )
    found = problems(scan(root))
    assert found.pop("metadata.jsonl line 2").startswith("is not valid JSON (")
    assert found.pop("metadata.jsonl line 9") == "is nested more than 100 deep: correct it"
    rule = "is not among the images here; file_name counts from the folder of its metadata.jsonl"
    assert found == {
        "metadata.jsonl line 3": f"gone.png {rule}",
        "metadata.jsonl line 4": "a second entry for a.png: the first is line 1",
        "metadata.jsonl line 5": "no file_name",
        "metadata.jsonl line 6": "no file_name",
        "metadata.jsonl line 7": "no caption for b.png: text is not a text",
        "metadata.jsonl line 8": f"../photos/b.png {rule} (did you mean b.png?)",
        "b.png": "no caption but that of metadata.jsonl line 7, which is not text",
        "c.psd": ".psd is not supported: convert it to png",
    }


def test_metadata_of_deep_json_is_named(root, scan):
    result = scan(write(root, a_png=picture(1), a_txt="x", metadata_jsonl="[" * 100_000))
    assert list(problems(result)) == ["metadata.jsonl line 1"] and captions(result) == {"a.png": "x"}


def test_metadata_that_is_not_utf8(root, scan):
    write(root, a_png=picture(1), a_txt="x", metadata_jsonl=b"\xff\xff")
    result = scan(root)
    assert problems(result) == {"metadata.jsonl": "cannot be read as UTF-8 text"}
    assert captions(result) == {"a.png": "x"}


BAD_CAPTIONS: list[tuple[dict[str, bytes | str], str]] = [
    ({}, "no caption: there is no sub/a.txt, sub/a.caption or entry in a metadata.jsonl"),
    ({"sub__a_txt": " \n"}, "its caption is empty: sub/a.txt"),
    ({"sub__a_txt": "", "sub__a_caption": ""}, "its caption is empty: sub/a.txt and sub/a.caption"),
    ({"sub__a_txt": "\ufeff\ufeff\n\u200b"}, "its caption is empty: sub/a.txt"),
    ({"sub__a_txt": b"\xff\xffa\0"}, "its caption cannot be read as UTF-8 text: sub/a.txt"),
    ({"sub__a_txt": picture(1)}, "its caption cannot be read as UTF-8 text: sub/a.txt"),
    ({"sub__a_txt": b"\0" * 40}, "its caption is not text (the control character U+0000): sub/a.txt"),
    ({"sub__a_txt": "one".encode("utf-16-le")}, "its caption is not text (the control character U+0000): sub/a.txt"),
    ({"sub__a_txt": "\x1b[31mone"}, "its caption is not text (the control character U+001B): sub/a.txt"),
    ({"sub__a_txt": "caf\ufffd"}, "its caption is not text (the mark of a lost character: U+FFFD): sub/a.txt"),
    ({"sub__a_txt": "one", "sub__a_caption": "two"}, "captions that differ: sub/a.caption and sub/a.txt"),
    ({"sub__a_txt": "one", "sub__a_caption": ""}, "captions that differ: sub/a.caption and sub/a.txt"),
    (
        {"sub__a_txt": "one", "metadata_jsonl": lines({"file_name": "sub/a.png", "text": "two"})},
        "captions that differ: sub/a.txt and metadata.jsonl line 1",
    ),
    (
        {
            "metadata_jsonl": lines({"file_name": "sub/a.png", "text": "one"}),
            "sub__metadata_jsonl": lines({"file_name": "a.png", "text": "two"}),
        },
        "captions that differ: metadata.jsonl line 1 and sub/metadata.jsonl line 1",
    ),
]


def test_captions_that_cannot_be_used(root, scan):
    for number, (files, reason) in enumerate(BAD_CAPTIONS):
        folder = root / str(number)
        write(folder, sub__a_png=picture(1), ok_png=picture(2), ok_txt="fine", **files)
        result = scan(folder)
        found = problems(result)
        assert set(found) == {"sub/a.png"}, reason
        assert sorted(found["sub/a.png"].split()) == sorted(reason.split())  # the order of the sources is free
        assert captions(result) == {"ok.png": "fine"}, reason


def test_captions_in_utf16_and_utf32_with_a_byte_order_mark_are_read(root, scan):
    for encoding in ("utf-16", "utf-32"):
        entry = lines({"file_name": "b.png", "text": "寿司"})
        files = {"a_txt": "a h\u00e9ron\r\n".encode(encoding), "metadata_jsonl": entry.encode(encoding)}
        result = scan(write(root, a_png=picture(1), b_png=picture(2), **files))
        assert (captions(result), result.problems) == ({"a.png": "a h\u00e9ron", "b.png": "寿司"}, []), encoding


def test_captions_of_metadata_that_are_not_text_are_named_by_line(root, scan):
    write(root, a_png=picture(1), a_txt="fine", b_png=picture(2), b_txt="fine", c_png=picture(3), c_txt="fine")
    texts = {"a.png": "salmon \ud83c", "b.png": "\0", "c.png": "\ufffe"}
    write(root, metadata_jsonl=lines(*({"file_name": name, "text": text} for name, text in texts.items())))
    result = scan(root)
    assert problems(result) == {
        "metadata.jsonl line 1": "the caption of a.png is not text (half of a surrogate pair: U+D83C)",
        "metadata.jsonl line 2": "the caption of b.png is not text (the control character U+0000)",
        "metadata.jsonl line 3": "the caption of c.png is not text (the noncharacter U+FFFE)",
    }
    write_report(result, root / "data_report.json")
    (root / "a.txt").unlink()
    assert problems(scan(root))["a.png"] == "no caption but that of metadata.jsonl line 1, which is not text"


def test_every_line_of_a_caption_is_a_caption_and_a_note_says_so(root, scan):
    write(
        root,
        a_png=picture(1),
        a_txt="\n one \r\n\ntwo\rthree\n",
        b_png=picture(2),
        b_txt="one\tline\n\n",
        c_png=picture(3),
    )
    write(root, metadata_jsonl=lines({"file_name": "c.png", "text": "uno\ndos"}))
    result = scan(root)
    assert captions(result) == {"a.png": "one", "b.png": "one\tline", "c.png": "uno"}
    assert result.problems == []
    every = {sample.name: sample.captions for sample in result.samples}
    assert every == {"a.png": ("one", "two", "three"), "b.png": ("one\tline",), "c.png": ("uno", "dos")}
    assert result.notes == ["2 images have several captions (first: a.png): captions.lines says which of them are used"]


def test_characters_that_clips_tokenizer_replaced_are_counted(root, scan):
    write(
        root,
        a_png=picture(1),
        a_txt="a cat\u2019s \u201cbowl\u201d",
        b_png=picture(2),
        b_txt="\ufb01sh &amp; ch\uff49ps",
    )
    write(root, c_png=picture(3), c_txt="caf\u00e9\u3000寿司\u2028\U0001f363, AT&T - 'plain' & \"quotes\"")
    (note,) = scan(root).notes
    assert note.startswith("2 captions have characters that CLIP's original tokenizer replaced (")
    for found in ("U+2019 right single quotation mark", "U+FB01 latin small ligature fi", "U+FF49 fullwidth", "&amp;"):
        assert (found in note) == (found != "&amp;"), note
    assert " and 1 more; first in " in note and note.isascii()


def test_the_same_caption_twice_is_no_conflict(root, scan):
    write(root, a_png=picture(1), a_txt="one", a_caption="one\n")
    assert captions(scan(root)) == {"a.png": "one"}


def test_a_caption_and_an_image_that_are_both_bad_are_both_named(root, scan):
    write(root, a_png=b"", b_png=picture(1), b_txt="x", c_png=picture(2))
    assert [(problem.name, problem.reason) for problem in scan(root).problems] == [
        ("a.png", "no caption: there is no a.txt, a.caption or entry in a metadata.jsonl"),
        ("a.png", "the file is empty"),
        ("c.png", "no caption: there is no c.txt, c.caption or entry in a metadata.jsonl"),
    ]


def test_images_that_cannot_be_used(root, scan):
    jpeg, png = picture(1, "JPEG", size=(64, 64)), BytesIO()
    Image.effect_noise((64, 64), 50).save(png, "PNG")
    pages = BytesIO()
    Image.new("RGB", (8, 8)).save(pages, "TIFF", save_all=True, append_images=[Image.new("RGB", (8, 8))])
    bad = {
        "empty_jpg": b"",
        "cutjpeg_jpg": jpeg[: len(jpeg) - 100],
        "cutpng_png": png.getvalue()[:2000],
        "text_png": b"<html>not found</html>",
        "bomb_png": bomb(),
        "pages_tiff": pages.getvalue(),
    }
    write(root, **bad, **{f"{key.rpartition('_')[0]}_txt": "x" for key in bad}, ok_png=picture(1), ok_txt="fine")
    (root / "link.png").symlink_to(root / "nowhere.png")
    (root / "link.txt").write_text("x")
    os.mkfifo(root / "pipe.png")
    (root / "pipe.txt").write_text("x")
    result = scan(root)
    found = problems(result)
    assert captions(result) == {"ok.png": "fine"}
    assert found.pop("cutjpeg.jpg").startswith("truncated: ")
    assert found.pop("cutpng.png").startswith("truncated: ")
    assert found.pop("text.png").startswith("not an image that Pillow can read")
    assert found == {
        "empty.jpg": "the file is empty",
        "bomb.png": "decompression bomb: 30000x30000 pixels is over the limit of 178956970 pixels",
        "pages.tiff": "it has 2 pages: save the one that is meant as a file of its own",
        "link.png": "not a file: a broken link?",
        "pipe.png": "not a file: a broken link?",
    }
    assert [problem.name for problem in result.problems] == sorted(problem.name for problem in result.problems)


def test_unusual_images_are_used(root, scan):
    palette = Image.new("P", (12, 8))
    palette.putpalette([255, 0, 0])
    buffer = BytesIO()
    palette.save(buffer, "PNG", transparency=0)
    write(
        root,
        cmyk_jpg=picture(0, "JPEG", mode="CMYK"),
        deep_png=picture(40000, mode="I;16"),
        palette_png=buffer.getvalue(),
        grey_png=picture(9, mode="L"),
        greyalpha_png=picture(9, mode="LA"),
        webpinjpg_jpg=picture(5, "WEBP"),
    )
    names = ["cmyk.jpg", "deep.png", "palette.png", "grey.png", "greyalpha.png", "webpinjpg.jpg"]
    for name in names:
        (root / name).with_suffix(".txt").write_text(name)
    result = scan(root)
    assert result.problems == []
    assert captions(result) == {name: name for name in names}
    assert {(sample.width, sample.height) for sample in result.samples} == {(12, 8)}


def test_a_file_without_the_right_to_read_it(root, scan, monkeypatch):
    write(root, a_png=picture(1), a_txt="x", b_png=picture(2), b_txt="y")
    real = os.open

    def refuse(path, *arguments, **options):
        if str(path).endswith("a.png"):
            raise PermissionError(13, "Permission denied")
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse)
    result = scan(root)
    assert problems(result) == {"a.png": "cannot be read (Permission denied)"}
    assert captions(result) == {"b.png": "y"}


def test_other_picture_formats_are_problems(root, scan):
    for suffix in ("psd", "PSD", "tga", "dng"):
        result = scan(write(root / suffix, a_png=picture(1), a_txt="x", b_txt="y", **{f"b_{suffix}": b"anything"}))
        assert problems(result) == {f"b.{suffix}": f".{suffix.lower()} is not supported: convert it to png"}
        assert result.notes == [], suffix  # b.txt belongs to b.gif: not an orphan


def test_hidden_and_other_files_are_counted_and_left_alone(root, scan):
    write(root, a_png=picture(1), a_txt="x", tags_json="{}", movie_mp4=b"0")
    (root / ".thumbs").mkdir()
    (root / ".thumbs" / "b.png").write_bytes(b"")
    (root / "._a.png").write_bytes(b"mac")
    result = scan(root)
    assert (captions(result), result.problems, result.ignored) == ({"a.png": "x"}, [], 4)


def test_a_caption_without_an_image_is_a_note(root, scan):
    result = scan(write(root, a_png=picture(1), a_txt="x", sub__b_txt="y", c_caption="z"))
    assert result.notes == ["c.caption: a caption without an image", "sub/b.txt: a caption without an image"]
    assert result.problems == []


REPEATS = [
    ("10_cats", 10),
    ("sub/3_dogs and more", 3),
    ("10_cats/close", 10),
    ("10_cats/2_close", 2),
    ("cats_10", 1),
    ("10", 1),
    ("10_", 1),
    ("999_x", 999),
    ("2024_trip", 1),
    ("20240105_trip", 1),
]


def test_repeat_folders(root, scan):
    for number, (folder, repeats) in enumerate(REPEATS):
        path = root / str(number) / folder
        path.mkdir(parents=True)
        (path / "a.png").write_bytes(picture(1))
        (path / "a.txt").write_text("x")
        result = scan(root / str(number))
        assert [sample.repeats for sample in result.samples] == [repeats], folder


def test_the_data_folder_itself_does_not_count_as_a_folder_of_repeats(tmp_path, scan):
    root = write(
        tmp_path / "5_all", **{"10_cats__a_png": picture(1), "10_cats__a_txt": "x", "b_png": picture(2), "b_txt": "y"}
    )
    result = scan(root)
    assert {sample.name: sample.repeats for sample in result.samples} == {"10_cats/a.png": 10, "b.png": 1}


def test_no_repeats_leave_an_image_out_by_name(root, scan):
    write(root, **{"0_no__a_png": picture(1), "0_no__a_txt": "x", "b_png": picture(2), "b_txt": "y"})
    result = scan(root)
    assert problems(result) == {"0_no/a.png": "its folder asks for no repeats: 0_no"}
    assert captions(result) == {"b.png": "y"}


def test_links_are_followed_and_loops_end(root, tmp_path, scan):
    write(root, a_png=picture(1), a_txt="x")
    write(tmp_path / "elsewhere", b_png=picture(2), b_txt="y")
    (root / "loop").symlink_to(root)
    (root / "other").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(root)
    result = scan(root)
    assert captions(result) == {"a.png": "x", "other/b.png": "y"}
    assert result.notes == [
        f"2 files outside of this folder, read through links: other/b.png is {tmp_path / 'elsewhere' / 'b.png'}",
        "loop: the same folder as ., read once",
        "other/back: the same folder as ., read once",
    ]


def refuse_to_list(folder, monkeypatch):
    """Listing `folder` fails. Permissions do not stop the root user, who often runs tests."""

    def refusing(real):
        def listing(path):
            if Path(path) == folder:
                raise PermissionError(13, "Permission denied", str(path))
            return real(path)

        return listing

    for name in ("scandir", "listdir"):
        monkeypatch.setattr(os, name, refusing(getattr(os, name)))


def test_a_folder_that_cannot_be_listed_is_named(root, scan, monkeypatch):
    write(root, a_png=picture(1), a_txt="x", sub__b_png=picture(2))
    refuse_to_list(root / "sub", monkeypatch)
    assert problems(scan(root)) == {"sub": "cannot be read: Permission denied"}


def test_names_that_are_not_utf8_can_be_shown(root, scan):
    root.mkdir()
    stem = os.fsencode(root) + b"/caf\xe9"
    for suffix, content in ((b".png", picture(1)), (b".txt", b"x")):
        with open(stem + suffix, "wb") as file:
            file.write(content)
    (sample,) = scan(root).samples
    assert sample.name == "caf\\udce9.png" and sample.caption == "x"
    assert sample.read() == picture(1)


def test_the_order_is_by_content_so_renaming_changes_nothing(root, tmp_path, scan):
    for index in range(8):
        write(root, **{f"{index}_png": picture(index), f"{index}_txt": str(index)})
        write(tmp_path / "renamed" / "sub", **{f"{9 - index}x_png": picture(index), f"{9 - index}x_txt": str(index)})
    # One picture under two captions, in the other order by name.
    write(root, a_png=picture(50), a_txt="one", b_png=picture(50), b_txt="two")
    write(tmp_path / "renamed", b_png=picture(50), b_txt="one", a_png=picture(50), a_txt="two")
    before, after = scan(root).samples, scan(tmp_path / "renamed").samples
    assert [(s.image_hash, s.caption) for s in before] == [(s.image_hash, s.caption) for s in after]
    assert [s.image_hash for s in before] == sorted(s.image_hash for s in before)


def test_the_same_image_with_the_same_caption_is_kept_and_noted(root, scan):
    write(root, a_png=picture(1), a_txt="x", sub__b_png=picture(1), sub__b_txt="x", c_png=picture(1), c_txt="other")
    result = scan(root)
    assert len(result.samples) == 3
    assert result.notes == ["a.png, sub/b.png: the same image with the same caption; all are used"]
    for number in range(5):
        write(root, **{f"z{number}_png": picture(1), f"z{number}_txt": "x"})
    names = "a.png, sub/b.png, z0.png and 4 more"
    assert scan(root).notes == [f"{names}: the same image with the same caption; all are used"]


# --- what is remembered ---


def same(first: Scan, second: Scan) -> bool:
    one, other = list(first.samples), list(second.samples)
    return one == other and (first.problems, first.notes) == (second.problems, second.notes)


def test_a_second_scan_reads_no_pixels_and_finds_the_same(root, scan, decodes):
    write(root, a_png=picture(1), a_txt="x", b_png=picture(2), b_txt="y")
    first = scan(root)
    assert len(decodes) == 2
    second = scan(root)
    assert len(decodes) == 2
    assert same(first, second)


def test_the_check_shows_its_progress_when_asked(root, scan, capsys, monkeypatch):
    monkeypatch.setattr(progress, "on_terminal", lambda: True)
    write(root, a_png=picture(1), a_txt="x")
    scan(root, remembered=Remembered(root / ".none"))
    assert capsys.readouterr().err == ""
    scan(root, remembered=Remembered(root / ".none2"), show_progress=True)
    shown = capsys.readouterr().err
    assert "checking images" in shown and "1/1" in shown
    scan(root, remembered=Remembered(root / ".none2"), show_progress=True)
    assert capsys.readouterr().err == ""  # there was nothing to check


def test_only_what_changed_is_decoded_again(root, scan, decodes):
    write(root, a_png=picture(1), a_txt="x", b_png=picture(2), b_txt="y")
    scan(root)
    decodes.clear()
    write(root, b_png=picture(3, size=(9, 9)), a_txt="changed")
    result = scan(root)
    assert decodes == [picture(3, size=(9, 9))]
    assert captions(result) == {"a.png": "changed", "b.png": "y"}
    assert {sample.name: sample.width for sample in result.samples} == {"a.png": 12, "b.png": 9}


def test_a_bad_image_is_looked_at_once(root, scan, decodes, monkeypatch):
    write(root, a_png=b"bad", a_txt="x", b_png=picture(2), b_txt="y")
    first = scan(root)
    assert same(first, scan(root)) and sorted(decodes) == sorted([b"bad", picture(2)])
    monkeypatch.setattr(checking, "decoders", lambda: "Pillow 1000")  # which may read it
    monkeypatch.setattr(dataset, "decoders", lambda: "Pillow 1000")
    assert same(first, scan(root)) and decodes[2:] == [b"bad"]


def test_an_image_that_cannot_be_read_now_is_looked_at_again(root, scan, monkeypatch):
    write(root, a_png=picture(1), a_txt="x", b_png=picture(2), b_txt="y")
    real = inspecting.read_regular

    def broken_disk(path, most):
        if path.name == "a.png":
            raise UnreadableFile(path, "cannot be read (Input/output error)")
        return real(path, most)

    monkeypatch.setattr(inspecting, "read_regular", broken_disk)
    assert problems(scan(root)) == {"a.png": "cannot be read (Input/output error)"}
    monkeypatch.setattr(inspecting, "read_regular", real)
    assert captions(scan(root)) == {"a.png": "x", "b.png": "y"}


def test_a_check_that_is_interrupted_keeps_what_it_did(root, scan, decodes, monkeypatch):
    write(root, a_png=picture(1), a_txt="x", b_png=picture(2), b_txt="y")
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    counting = inspecting.decode_and_describe

    def interrupted(data):
        if data == picture(2):
            raise KeyboardInterrupt
        return counting(data)

    monkeypatch.setattr(inspecting, "decode_and_describe", interrupted)
    with pytest.raises(KeyboardInterrupt):
        scan(root)
    assert decodes == [picture(1)]
    monkeypatch.setattr(inspecting, "decode_and_describe", counting)
    scan(root)
    assert decodes == [picture(1), picture(2)]


# --- colours ---


def test_what_is_done_to_colours_is_counted_and_files_whose_colours_are_uncertain_are_named(root, scan, decodes):
    linear = {"icc_profile": matrix_profile(SRGB, 1.0)}
    write(root, a_png=picture(1, **linear), b_png=picture(2, **linear), c_png=picture(3, mode="RGBA"))
    write(root, d_jpg=picture(4, "JPEG", mode="CMYK"), e_png=picture(5, icc_profile=b"broken"), f_png=picture(6))
    write(root, **{f"{letter}_txt": "x" for letter in "abcdef"})
    for count in (6, 6):  # the second time from memory
        result = scan(root)
        assert result.notes == [
            "2 images are converted to sRGB from the colour profile without a name (first: a.png)",
            "1 image is transparent, and laid over white (first: c.png)",
            "d.jpg: CMYK without a colour profile: converted by a plain formula",
            "e.png: a colour profile that cannot be read: the colours are taken for sRGB",
        ]
        assert {sample.name for sample in result.samples if sample.converted} == {"a.png", "b.png"}
        assert result.problems == [] and len(decodes) == count


# --- what this program wrote ---


def run_files(folder: Path) -> None:
    write(folder, run_json='{"format": 2}', config_yaml="", samples__progress_png=picture(7), samples__progress_txt="x")
    write(folder, wandb__x_png=picture(8), evaluation_parquet=b"")


def test_what_this_program_wrote_is_skipped_and_named(root, tmp_path, scan):
    write(root, photos__a_png=picture(1), photos__a_txt="a cat", photos__run_json="{}")
    run_files(root / "runs" / "first")
    run_files(tmp_path / "elsewhere")
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    write(root, begun__x_png=picture(2))
    (root / "begun" / ".lock").write_text("process 12 on there")
    write(root, kept__files_json='{"version": 3, "files": {}}', kept__latents__b_arrow=b"", kept__x_png=picture(2))
    write(root, cache__x_png=picture(2))
    write(root, results__evaluation_json='{"results": {}}', results__grid_png=picture(3), results__mine_png=picture(4))
    write(root, results__mine_txt="mine", results__base__provenance_json="[]", results__base__evaluation_parquet=b"")
    write(root, results__base__samples__x_png=picture(3))
    write(
        root, page__comparison_json='{"variants": []}', page__curves_png=picture(5), page__wandb__run__x_png=picture(6)
    )
    (root / "page" / "wandb" / "run").rename(root / "page" / "wandb" / "run-20260102_030405-abc")
    (root / "drawn").mkdir()
    write(root, drawn__grid_png=picture(9))
    (root / "drawn" / "grid").mkdir()
    (root / "drawn" / "grid" / "00-00.png").write_bytes(picture(9))
    for place in ("left/remembered", "photos"):  # a table of such a name does not make a folder a cache
        (root / place).mkdir(parents=True, exist_ok=True)
        (root / place / f"images-{32 * '0'}.arrow").touch()
    result = scan(root, outputs={root / "cache": "the cache folder"})
    assert captions(result) == {"photos/a.png": "a cat", "results/mine.png": "mine"}
    assert result.problems == []
    assert (
        sorted(result.skipped)
        == sorted(set(result.notes))
        == [
            "begun: a run folder, skipped",
            "cache: the cache folder, skipped",
            "drawn/grid.png: a picture of this program, skipped",
            "drawn/grid: the images of a grid, skipped",
            "kept: a cache folder, skipped",
            "left/remembered: a cache folder, skipped",
            "linked: a run folder, skipped",
            "page/curves.png: a picture of this program, skipped",
            "page/wandb: a folder of W&B, skipped",
            "results/base: the evaluation of an adapter file, skipped",
            "results/grid.png: a picture of this program, skipped",
            "runs/first: a run folder, skipped",
        ]
    )


def test_an_unreadable_folder_next_to_an_image_of_its_name_is_a_problem(root, scan, monkeypatch):
    write(root, a_png=picture(1), a_txt="a cat", a__b_png=picture(2))
    refuse_to_list(root / "a", monkeypatch)
    result = scan(root)
    assert captions(result) == {"a.png": "a cat"}
    assert problems(result) == {"a": "cannot be read: Permission denied"}


def test_folders_of_other_programs_are_read(root, scan):
    names = [
        "runs/a",
        "samples/a",
        "cache/a",
        "wandb/run-1",
        "other/a",
        "own/text_1",
        "pages/grid",
        "2024/07-01",
        "2024",
    ]
    for number, name in enumerate(names):
        path = root / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number))
    write(root, other__run_json='{"loss": 1}', other__config_yaml="", own__files_json="[]", pages__evaluation_json="{}")
    write(root, metadata_jsonl=lines(*({"file_name": f"{name}.png", "text": "x"} for name in names)))
    result = scan(root)
    assert sorted(captions(result)) == sorted(f"{name}.png" for name in names)
    assert result.problems == [] and result.notes == []


def test_a_run_folder_that_is_asked_for_is_read(root, scan):
    run_files(root)
    assert captions(scan(root / "samples")) == {"progress.png": "x"}
    result = scan(root, outputs={root: "the run folder"})
    assert captions(result) == {"samples/progress.png": "x"} and result.skipped == []
    with pytest.raises(UserError, match=r"holds no image \(photos: a run folder, skipped\)"):
        scan(root.parent)


def test_tables_and_runs_do_not_share_a_folder(root, scan):
    write_table(root / "data.parquet", {"image": [{"bytes": picture(1), "path": None}], "text": ["x"]})
    assert len(scan(root, outputs={root.parent / "runs": "the run folder"}).samples) == 1
    for outputs in ({root / "runs" / "new": "the run folder"}, {}):
        with pytest.raises(
            UserError, match="holds tables, and inside it is .*runs.*: give run.folder and cache.folder"
        ):
            scan(root, outputs=outputs)
        run_files(root / "runs" / "old")


# --- an HF data set ---


def table(colours=(1, 2, 3), texts=("one", "two", "three"), **columns):
    import datasets

    cells = [{"bytes": picture(colour), "path": None} for colour in colours]
    rows = datasets.Dataset.from_dict({"image": cells, "text": list(texts), **columns})
    return rows.cast_column("image", datasets.Image())


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """No test reaches the hub or writes to the user's cache of data sets."""
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf_cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def test_a_saved_dataset(root, scan):
    table().save_to_disk(str(root))
    result = scan(root)
    assert captions(result) == {"train[0]": "one", "train[1]": "two", "train[2]": "three"}
    assert result.problems == []
    sample = next(sample for sample in result.samples if sample.caption == "two")
    assert sample.read() == picture(2) and sample.image_hash == content_hash(picture(2))
    assert (sample.width, sample.height, sample.repeats) == (12, 8, 1)
    assert pickle.loads(pickle.dumps(sample)).read() == picture(2)


def test_a_saved_dataset_dict_and_its_splits(root, scan):
    import datasets

    datasets.DatasetDict({"train": table(), "test": table((7,), ("seven",))}).save_to_disk(str(root))
    assert captions(scan(root, split="test")) == {"test[0]": "seven"}
    with pytest.raises(UserError, match="has no split valid: set data.split to one of train, test"):
        scan(root, split="valid")


def test_a_saved_dataset_of_another_split_is_not_taken_for_it(root, scan):
    import datasets

    (root / "parquet").mkdir(parents=True)
    table().to_parquet(str(root / "parquet" / "test.parquet"))
    datasets.load_dataset(str(root / "parquet"), split="test[:2]").save_to_disk(str(root / "saved"))
    assert set(captions(scan(root / "saved", split="test"))) == {"test[0]", "test[1]"}
    with pytest.raises(UserError, match="has no split train: set data.split to one of .*test"):
        scan(root / "saved")


def test_a_folder_of_parquet_files_and_its_splits(root, scan):
    (root / "data").mkdir(parents=True)
    table().to_parquet(str(root / "data" / "train-00000-of-00001.parquet"))
    table((7,), ("seven",)).to_parquet(str(root / "data" / "test-00000-of-00001.parquet"))
    (root / "README.md").write_text("a card")
    assert captions(scan(root)) == {"train[0]": "one", "train[1]": "two", "train[2]": "three"}
    assert captions(scan(root, split="test[:1]")) == {"test[:1][0]": "seven"}
    with pytest.raises(UserError, match=r"'train', 'test'") as caught:
        scan(root, split="valid")
    assert "data.split" in str(caught.value)


def test_a_folder_of_arrow_files(root, tmp_path, scan):
    table().save_to_disk(str(tmp_path / "saved"))
    root.mkdir()
    (tmp_path / "saved" / "data-00000-of-00001.arrow").rename(root / "data-00000-of-00001.arrow")
    assert len(scan(root).samples) == 3


def test_images_next_to_a_table_are_what_is_meant(root, scan):
    write(root, a_png=picture(1), a_txt="x")
    table().to_parquet(str(root / "old.parquet"))
    result = scan(root)
    assert (captions(result), result.ignored) == ({"a.png": "x"}, 1)


def test_columns_are_named_when_one_is_missing(root, scan):
    table().save_to_disk(str(root))
    with pytest.raises(UserError, match="has no column picture: set data.image_column to one of image, text"):
        scan(root, image_column="picture")
    with pytest.raises(UserError, match="has no column caption: set data.caption_column to one of image, text"):
        scan(root, caption_column="caption")


def test_a_column_of_numbers_holds_no_images(root, scan):
    table((1, 2, 3), ("one\ntwo\n", "\x85", "fine")).save_to_disk(str(root / "long"))
    result = scan(root / "long")
    assert captions(result) == {"train[0]": "one", "train[2]": "fine"}
    assert problems(result) == {"train[1]": "its caption is not text (the control character U+0085): column text"}
    assert [sample.captions for sample in result.samples if sample.name == "train[0]"] == [("one", "two")]
    table(likes=[1, 2, 3]).save_to_disk(str(root))
    with pytest.raises(UserError, match="the column likes of .* holds no images"):
        scan(root, image_column="likes")


def test_columns_of_plain_bytes_and_of_paths(root, scan):
    import datasets

    texts = {"text": ["a", "b"]}
    paths = {"image": [str(root / "paths" / "one.png"), "gone.png", "one.png"], "text": ["a", "b", "c"]}
    datasets.Dataset.from_dict(paths).save_to_disk(str(root / "paths"))
    write(root / "paths", one_png=picture(1))
    result = scan(root / "paths")
    assert captions(result) == {"train[0]": "a", "train[2]": "c"}
    assert problems(result) == {"train[1]": "cannot be read: No such file or directory"}
    datasets.Dataset.from_dict({"image": [picture(1), None], **texts}).save_to_disk(str(root / "bytes"))
    result = scan(root / "bytes")
    assert captions(result) == {"train[0]": "a"}
    assert problems(result) == {"train[1]": "the row has no image"}


def write_table(path: Path, rows: dict) -> None:
    import datasets
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    # Not datasets.Image, which drops the bytes of a cell whose path is a file here.
    image = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    features = datasets.Features({"image": image, "text": datasets.Value("string")})
    pyarrow.parquet.write_table(datasets.Dataset.from_dict(rows, features=features).data.table, path)


def test_rows_name_no_file_outside_of_the_data_set(root, tmp_path, scan, monkeypatch):
    """A data set that was downloaded must not be able to carry a private picture away."""
    private = write(tmp_path / "private", passport_png=picture(9)) / "passport.png"
    monkeypatch.chdir(tmp_path)
    (root / "set").mkdir(parents=True)
    (root / "set" / ".link").symlink_to(tmp_path / "private")
    names = [str(private), "../../private/passport.png", "private/passport.png", ".link/passport.png"]
    names += [f"file://{private}", "https://example.org/x.png", f"zip://x.png::{private}", "a\0b.png", "."]
    cells = [{"bytes": picture(1), "path": str(private)}, *({"bytes": None, "path": name} for name in names)]
    write_table(root / "set" / "train.parquet", {"image": cells, "text": ["x"] * len(cells)})
    result = scan(root / "set")
    assert captions(result) == {"train[0]": "x"}, "bytes in the row are the image, whatever its path"
    found = problems(result)
    assert found.keys() == {f"train[{row}]" for row in range(1, len(cells))}
    for row in (1, 2, 4):
        assert f"its image {names[row - 1]} is outside of the data set and is not read" in found[f"train[{row}]"]
    assert found["train[3]"] == "cannot be read: No such file or directory", "not the working folder's"


def test_images_of_a_hub_data_set_are_where_it_was_downloaded_to(tmp_path, scan, monkeypatch):
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    blob = write(tmp_path / "hub/datasets--org--name/blobs", a_png=picture(1)) / "a.png"
    other = write(tmp_path / "hub/datasets--org--private/blobs", b_png=picture(2)) / "b.png"
    (blob.parents[1] / "snapshots").mkdir()
    (blob.parents[1] / "snapshots" / "a.png").symlink_to(blob)
    paths = [str(blob.parents[1] / "snapshots" / "a.png"), str(other)]
    rows = datasets.Dataset.from_dict({"image": paths, "text": ["a", "b"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments, **options: rows)
    result = scan("org/name")
    assert captions(result) == {"train[0]": "a"} and list(problems(result)) == ["train[1]"]


def test_data_sets_name_no_files_elsewhere(root, tmp_path, scan):
    table().save_to_disk(str(tmp_path / "private"))
    table().to_parquet(str(tmp_path / "private" / "train.parquet"))
    absolute = str(tmp_path / "private" / "train.parquet")
    for source in ("../private/*.parquet", absolute, "https://example.org/x.parquet"):
        card = f"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: {source}\n---\n"
        write(root, README_md=card)
        table((5,), ("own",)).to_parquet(str(root / "own.parquet"))
        with pytest.raises(UserError, match=r"names .*\.parquet in its README\.md, which is outside of the folder"):
            scan(root)
    table().save_to_disk(str(root / "saved"))
    state = json.loads((root / "saved" / "state.json").read_text())
    state["_data_files"] = [{"filename": "../../private/data-00000-of-00001.arrow"}]
    (root / "saved" / "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match=r"names \.\./\.\./private/data-.* in its state\.json, which is outside"):
        scan(root / "saved")
    write(root, split__dataset_dict_json=json.dumps({"splits": ["train", str(tmp_path / "private")]}))
    with pytest.raises(UserError, match=r"names /.*private in its dataset_dict\.json, which is outside"):
        scan(root / "split")


def test_a_table_that_was_replaced_on_the_same_date_gives_its_new_rows(root, scan):
    for caption in ("one", "two"):  # of one size and date, as `cp -p` leaves them
        write_table(root / "train.parquet", {"image": [{"bytes": picture(1), "path": None}], "text": [caption]})
        os.utime(root / "train.parquet", (1_500_000_000, 1_500_000_000))
        assert captions(scan(root)) == {"train[0]": caption}


def test_captions_of_rows(root, scan):
    table((1, 2, 3), (None, " ", " fine ")).save_to_disk(str(root / "texts"))
    result = scan(root / "texts")
    assert captions(result) == {"train[2]": "fine"}
    assert problems(result) == {
        "train[0]": "no caption: column text",
        "train[1]": "its caption is empty: column text",
    }
    table((1, 2, 3), (["one", "uno"], ["two"], [])).save_to_disk(str(root / "lists"))
    result = scan(root / "lists")
    assert captions(result) == {"train[0]": "one", "train[1]": "two"}
    assert problems(result) == {"train[2]": "no caption: column text"}
    assert [sample.captions for sample in result.samples if sample.name == "train[0]"] == [("one", "uno")]
    assert result.notes == [
        "1 image has several captions (first: train[0]): captions.lines says which of them are used"
    ]
    table((1, 2, 3), ("one\ntwo\n", "\x85", "fine")).save_to_disk(str(root / "long"))
    result = scan(root / "long")
    assert captions(result) == {"train[0]": "one", "train[2]": "fine"}
    assert problems(result) == {"train[1]": "its caption is not text (the control character U+0085): column text"}
    assert [sample.captions for sample in result.samples if sample.name == "train[0]"] == [("one", "two")]
    table(likes=[1, 2, 3]).save_to_disk(str(root / "numbers"))
    assert len(scan(root / "numbers", caption_column="likes").problems) == 3


def test_a_damaged_image_in_a_row(root, scan):
    import datasets

    cells = [{"bytes": picture(1)[:-30], "path": None}, {"bytes": picture(2), "path": None}]
    rows = datasets.Dataset.from_dict({"image": cells, "text": ["a", "b"]}).cast_column("image", datasets.Image())
    rows.save_to_disk(str(root))
    result = scan(root)
    assert captions(result) == {"train[1]": "b"}
    assert set(problems(result)) == {"train[0]"}


def test_data_sets_that_cannot_be_loaded(root, scan):
    write(root, broken__x_parquet=b"no", saved__state_json="{", gone__a_parquet=b"")
    with pytest.raises(UserError, match=r"^the data set .*broken could not be loaded \("):
        scan(root / "broken")
    with pytest.raises(UserError, match=r"saved/state\.json is not valid JSON \(.*: save the data set again"):
        scan(root / "saved")
    with pytest.raises(
        UserError, match=r"^the data set org-of-nobody/name could not be loaded \(.*connection"
    ) as caught:
        scan("org-of-nobody/name")
    assert "\n" not in str(caught.value)


def test_a_hub_id_is_loaded_by_its_revision(scan, monkeypatch):
    import datasets

    asked = []

    def load_dataset(path, *, split, revision):
        asked.append((path, split, revision))
        return table()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert scan("org/name").source == "org/name"
    result = scan("org/name", split="test", revision="abc")
    assert result.source == "org/name@abc" and "test[0]" in captions(result)
    assert asked == [("org/name", "train", None), ("org/name", "test", "abc")]


# --- a path with nothing to train on ---


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"notes_txt": "x"}, r"holds no image \(notes\.txt: a caption without an image\)\.$"),
        ({"a_tga": b"x"}, r"holds no image \(a\.tga: \.tga is not supported: convert it to png\)\.$"),
    ],
)
def test_a_folder_without_images(root, scan, files, message):
    with pytest.raises(UserError, match=message):
        scan(write(root, **files))


def test_a_data_set_without_rows(root, scan, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments, **options: table().select([]))
    with pytest.raises(UserError, match="org/name holds no image"):
        scan("org/name")
    table((), ()).save_to_disk(str(root))  # `datasets` cannot read what it wrote then
    with pytest.raises(UserError, match="cannot be read"):
        scan(root)


def test_a_path_that_is_not_there_names_its_neighbour(root, scan, monkeypatch):
    root.mkdir()
    with pytest.raises(UserError, match=rf"there is no {root.parent}/photo \(there is {root}\): "):
        scan(root.parent / "photo")
    with pytest.raises(UserError, match=r"there is no /no/such/place: "):
        scan("/no/such/place")
    (root / "cats").mkdir()
    monkeypatch.chdir(root.parent)
    # It looks like a hub id, but `photos` is a folder here.
    with pytest.raises(UserError, match=r"there is no photos/cat \(there is .*photos/cats\)"):
        scan("photos/cat")


def test_a_file_and_a_revision_of_a_folder_are_refused(root, scan):
    write(root, a_png=picture(1))
    with pytest.raises(UserError, match="is a file"):
        scan(root / "a.png")
    with pytest.raises(UserError, match="data.revision is set"):
        scan(root, revision="main")


# --- reports ---


def sample(name: str) -> Sample:
    return Sample(name, content_hash(name.encode()), "x", 12, 8, 1, bytes)


def broken(count: int) -> list[Problem]:
    return [Problem(f"{index}.png", "the file is empty") for index in range(count)]


def test_the_report_names_every_file(root, scan, tmp_path):
    write(root, a_png=picture(1), a_txt="x", b_png=b"", b_txt="y", c_txt="z", d_json="{}")
    path = tmp_path / "run" / "data_report.json"
    write_report(scan(root), path)
    assert json.loads(path.read_text()) == {
        "source": str(root),
        "counts": {"used": 1, "problems": 1, "cropped": 0, "notes": 1, "ignored": 1, "held_out": 0, "prior": 0},
        "problems": [{"name": "b.png", "reason": "the file is empty"}],
        "cropped": [],
        "notes": ["c.txt: a caption without an image"],
        "used": ["a.png"],
        "held_out": [],
        "prior": [],
        "evaluation": None,
        "prior_path": None,
    }
    assert os.listdir(path.parent) == [path.name]


def test_problems_stop_the_run_unless_they_are_to_be_skipped():
    scan = Scan("photos", samples=[sample("a.png")], problems=broken(12))
    with pytest.raises(UserError) as caught:
        require_clean(scan, "stop", Path("run/data_report.json"))
    shown = ", ".join(f"{number}.png (the file is empty)" for number in range(10))
    assert str(caught.value) == (
        f"12 problems in photos: {shown} and 2 more; "
        "the whole list is in run/data_report.json; fix them, or skip them with --data.on_bad_file skip."
    )
    require_clean(scan, "skip", None)
    require_clean(Scan("photos", samples=[sample("a.png")], notes=["a note"]), "stop", None)
    with pytest.raises(UserError, match=r"^1 problem in photos: 0\.png \(the file is empty\); fix"):
        require_clean(Scan("photos", samples=[sample("a.png")], problems=broken(1)), "stop", None)


def test_nothing_left_is_an_error_also_where_bad_files_are_skipped():
    with pytest.raises(UserError, match=r"^no image in photos can be used: 0\.png \(the file is empty\)"):
        require_clean(Scan("photos", problems=broken(1)), "skip", None)
