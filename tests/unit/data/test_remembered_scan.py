"""What the scan remembers, what it must not, and files that change or fail while it looks at them."""

import os
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from PIL import Image

from sushi_research import fingerprints
from sushi_research.data import caption_files, checking, dataset, inspecting
from sushi_research.data.checking import Place, check
from sushi_research.data.inspecting import Unusable
from sushi_research.errors import UserError
from sushi_research.remembered import NOTHING_REMEMBERED, Remembered
from sushi_research.workers import Worker


def picture(colour: int, size: tuple[int, int] = (12, 8)) -> bytes:
    buffer = BytesIO()
    Image.new("RGB", size, (colour, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def photos(tmp_path):
    root = tmp_path / "photos"
    root.mkdir()
    for number in range(4):
        (root / f"{number}.png").write_bytes(picture(number))
        (root / f"{number}.txt").write_text(f"caption {number}")
    return root


@pytest.fixture
def scan(tmp_path):
    def run(path, remembered=None):
        remembered = remembered or Remembered(tmp_path / "remembered")
        options = {"split": "train", "image_column": "image", "caption_column": "text", "revision": None}
        return dataset.scan(path, **options, remembered=remembered, show_progress=False)

    return run


@pytest.fixture
def looked_at(monkeypatch):
    """What is read in order to scan: images and caption files, by name; rows of tables as their bytes."""
    seen = []

    def counting(module, name):
        real = getattr(module, name)

        def read(first, *others):
            seen.append(first.name if isinstance(first, Path) else first)
            return real(first, *others)

        monkeypatch.setattr(module, name, read)

    counting(inspecting, "read_regular")
    counting(caption_files, "read_regular")
    return seen


def content(result):
    return [(sample.name, sample.captions, sample.image_hash, sample.fingerprint) for sample in result.samples]


def test_a_changed_file_alone_is_read_again(photos, scan, looked_at):
    first = scan(photos)
    assert len(looked_at) == 8
    looked_at.clear()
    assert content(scan(photos)) == content(first) and looked_at == []
    (photos / "2.png").write_bytes(picture(9))
    (photos / "3.txt").write_text("other")
    (photos / "1.png").rename(photos / "5.png")
    (photos / "1.txt").rename(photos / "5.txt")
    result = scan(photos)
    assert sorted(looked_at) == ["2.png", "3.txt", "5.png", "5.txt"]
    assert {sample.name: sample.caption for sample in result.samples} == {
        "0.png": "caption 0",
        "2.png": "caption 2",
        "3.png": "other",
        "5.png": "caption 1",
    }
    assert [sample.read() for sample in result.samples if sample.name == "2.png"] == [picture(9)]


def test_files_that_were_just_written_are_not_trusted(photos, scan, looked_at, monkeypatch):
    monkeypatch.setattr(fingerprints, "RACY_NS", 3600 * 10**9)
    scan(photos)
    looked_at.clear()
    scan(photos)
    assert len(looked_at) == 8


@pytest.mark.parametrize("kind", ["folder", "image-facts", "caption-files"])
def test_damage_in_what_is_remembered_is_no_damage(photos, scan, tmp_path, kind):
    first = scan(photos)
    for path in (tmp_path / "remembered").glob("*.arrow"):
        if path.name.startswith(kind):
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 255
            path.write_bytes(data)
        elif path.name.startswith("folder"):
            path.unlink()
    assert content(scan(photos)) == content(first)


def test_a_file_that_is_changed_while_it_is_read_is_noticed(photos, scan, monkeypatch):
    real = inspecting.read_regular

    def changed_meanwhile(path, most):
        data = real(path, most)
        if path.name == "1.png":
            path.write_bytes(picture(77))
        return data

    monkeypatch.setattr(inspecting, "read_regular", changed_meanwhile)
    sample = next(sample for sample in scan(photos).samples if sample.name == "1.png")
    with pytest.raises(UserError, match=r"1\.png was changed after it was checked: run the same command again"):
        sample.read()
    monkeypatch.setattr(inspecting, "read_regular", real)
    sample = next(sample for sample in scan(photos).samples if sample.name == "1.png")
    assert sample.read() == picture(77)


def test_a_folder_that_fails_in_the_middle_of_its_list_is_a_problem(photos, scan, monkeypatch):
    (photos / "sub").mkdir()
    (photos / "sub" / "x.png").write_bytes(picture(50))
    real = os.scandir

    class Broken:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def __iter__(self):
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "scandir", lambda path: Broken() if str(path).endswith("sub") else real(path))
    result = scan(photos)
    assert [(problem.name, problem.reason) for problem in result.problems] == [
        ("sub", "cannot be read: Input/output error")
    ]
    monkeypatch.setattr(os, "scandir", real)
    result = scan(photos)
    assert [problem.name for problem in result.problems] == ["sub/x.png"], "it has no caption"


HOSTILE = [
    "new\nline",
    "back\\slash",
    "quote\"'",
    "\u202etxet",
    "%2e%2e",
    " ",
    "-rf",
    "\udce9",
    "caf\u0065\u0301",
    "x" * 240,
]


def test_names_of_any_kind_are_found_again(tmp_path, scan, looked_at):
    root = tmp_path / "photos"
    root.mkdir()
    for number, stem in enumerate(HOSTILE):
        (root / f"{stem}.png").write_bytes(picture(number))
        (root / f"{stem}.txt").write_text(str(number))
    first = scan(root)
    looked_at.clear()
    second = scan(root)
    assert content(first) == content(second) and looked_at == [] and len(first.problems) == 0
    assert {sample.caption: sample.read() for sample in second.samples} == {
        str(number): picture(number) for number in range(len(HOSTILE))
    }


def test_rows_are_known_by_the_content_of_their_table_and_files_of_rows_by_their_state(tmp_path, scan, monkeypatch):
    import datasets

    datasets.disable_progress_bars()
    root, decoded, real = tmp_path / "set", [], inspecting.decode_and_describe
    monkeypatch.setattr(inspecting, "decode_and_describe", lambda data: decoded.append(data) or real(data))
    image = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    rows = {"image": [{"bytes": picture(1), "path": None}, {"bytes": None, "path": "own.png"}], "text": ["a", "b"]}
    features = datasets.Features({"image": image, "text": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(root))
    (root / "own.png").write_bytes(picture(2))
    first = scan(root)
    assert sorted(decoded) == sorted([picture(1), picture(2)])
    assert content(scan(root)) == content(first) and len(decoded) == 2
    (root / "own.png").write_bytes(picture(3))
    samples = {sample.name: sample for sample in scan(root).samples}
    found = {name: sample.read() for name, sample in samples.items()}
    assert found == {"train[0]": picture(1), "train[1]": picture(3)} and decoded[2:] == [picture(3)]
    (root / "own.png").unlink()
    (root / "own.png").mkdir()
    with pytest.raises(
        UserError, match=r"^train\[1\] could be read before but not now \(its image own\.png is not a file\)"
    ):
        samples["train[1]"].read()


# --- processes ---


def test_processes_learn_what_threads_learn(photos, scan, monkeypatch):
    (photos / "bad.png").write_bytes(picture(9)[:45])
    (photos / "bad.txt").write_text("x")
    in_threads = scan(photos, NOTHING_REMEMBERED)
    monkeypatch.setattr(checking, "PROCESSES_FROM", 2)
    monkeypatch.setattr(inspecting, "decode_and_describe", None)  # in this process nothing is decoded
    in_processes = scan(photos)
    assert content(in_processes) == content(in_threads) and len(in_processes.samples) == 4
    assert list(in_processes.problems) == list(in_threads.problems) and len(in_threads.problems) == 1


def test_a_process_that_decodes_imports_nothing_heavy():
    with Worker(eval) as worker:
        assert worker("bool(__import__('sushi_research.data.inspecting'))")
        loaded = worker("sorted(__import__('sys').modules)")
    assert "PIL.Image" in loaded and not {"torch", "datasets", "transformers", "diffusers"} & set(loaded)


def place_of(codes: list[str]) -> tuple[Place, pyarrow.Array]:
    """Images that a worker "decodes" by evaluating their paths as Python."""
    ones = np.ones(len(codes), bool)
    states = np.zeros((len(codes), 4), np.int64)
    names = pyarrow.array([f"{number}.png" for number in range(len(codes))], pyarrow.large_string())
    return Place("x", lambda row: b"", codes.__getitem__, states, ones, ones), names


def test_a_killed_process_is_one_sentence_and_what_was_checked_is_kept(tmp_path, monkeypatch):
    good = "__import__('sushi_research.data.inspecting', fromlist=['x']).Unusable('looked at', True)"
    killed = "__import__('os').kill(__import__('os').getpid(), 9)"
    place, names = place_of([good, good, killed, good])
    monkeypatch.setattr(checking, "PROCESSES_FROM", 1)
    monkeypatch.setattr(checking, "cores", lambda: 1)
    monkeypatch.setattr(checking, "inspect", eval)
    with pytest.raises(
        UserError, match=r"^2\.png could not be checked, because .* ended \(killed by SIGKILL\)"
    ) as caught:
        check(place, names, Remembered(tmp_path), False)
    assert "\n" not in str(caught.value)
    rest, _ = place_of(["1/0", "1/0", good, good])  # the first two are not looked at again
    facts = check(rest, names, Remembered(tmp_path), False)
    assert facts.texts["problem"] == dict.fromkeys(range(4), "looked at")


def test_long_checks_are_stored_now_and_then(tmp_path, monkeypatch):
    stored = []
    monkeypatch.setattr(checking, "_STORE_SECONDS", 0.0)
    monkeypatch.setattr(checking, "_store", lambda facts, *_: stored.append(int(facts.known.sum())))
    monkeypatch.setattr(checking, "inspect", lambda path: time.sleep(0.01) or Unusable("x", True))
    place, names = place_of(["a"] * 6)
    check(place, names, Remembered(tmp_path), False)
    assert len(stored) > 2 and stored[-1] == 6


def test_rows_are_not_known_by_files_that_another_split_has_now(tmp_path, scan, monkeypatch):
    import datasets

    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf_cache")
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    root = tmp_path / "set"
    splits = "configs:\n- config_name: default\n  data_files:\n  - {{split: train, path: {}}}\n  - {{split: test, path: {}}}\n"
    card = f"---\n{splits}---\n"
    root.mkdir()
    for number, name in enumerate("ab"):
        rows = {"image": [{"bytes": picture(number), "path": None}], "text": [name]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(root / f"{name}.parquet"))
    for train, test in ("ab", "ba"):
        (root / "README.md").write_text(card.format(f"{train}.parquet", f"{test}.parquet"))
        (sample,) = scan(root).samples
        assert (sample.caption, sample.read()) == (train, picture("ab".index(train)))


def test_two_files_that_are_shown_alike_are_a_problem(photos, scan):
    for name, colour in ((b"a\xff", 7), (b"a\\udcff", 8)):
        path = os.fsencode(photos) + b"/" + name
        Path(os.fsdecode(path + b".png")).write_bytes(picture(colour))
        Path(os.fsdecode(path + b".txt")).write_text(str(colour))
    found = scan(photos)
    assert [problem.name for problem in found.problems] == ["a\\udcff.png", "a\\udcff.txt"]
    (sample,) = (sample for sample in found.samples if sample.name == "a\\udcff.png")
    assert (sample.caption, sample.read()) == ("8", picture(8))


def test_files_of_any_time_are_read(photos, scan):
    first = scan(photos)
    for name, seconds in (("0.png", 10**10), ("1.txt", 10**10), ("2.png", -(2**31))):
        os.utime(photos / name, (seconds, seconds))
    assert sorted(content(scan(photos))) == sorted(content(first))


def test_a_file_of_a_row_is_looked_for_again(tmp_path, scan):
    import datasets

    datasets.disable_progress_bars()
    root, outside = tmp_path / "set", tmp_path / "outside"
    image = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    cells = [{"bytes": picture(1), "path": None}, {"bytes": None, "path": "pictures/own.png"}]
    features = datasets.Features({"image": image, "text": datasets.Value("string")})
    datasets.Dataset.from_dict({"image": cells, "text": ["a", "b"]}, features=features).save_to_disk(str(root))
    outside.mkdir()
    (outside / "own.png").write_bytes(picture(2))
    (root / "pictures").symlink_to(outside)
    found = scan(root)
    assert "outside of the data set" in found.problems[0].reason and len(found.samples) == 1
    # As the message says. The file itself stays what it was.
    (root / "pictures").unlink()
    outside.rename(root / "pictures")
    assert {sample.name: sample.read() for sample in scan(root).samples} == {
        "train[0]": picture(1),
        "train[1]": picture(2),
    }
    for number in (3, 4):
        path, link = root / f"{number}.png", root / "pictures" / "own.png"
        path.write_bytes(picture(number))
        link.unlink()
        link.symlink_to(path)
        assert picture(number) in [sample.read() for sample in scan(root).samples]
