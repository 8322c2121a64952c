"""Datasets whose own files are damaged or hostile: refused in one sentence, in a process that lives on."""

import os
import struct
from pathlib import Path

import pytest

from sushi_research.data.found import CaptionRule
from sushi_research.data.hf_dataset import columns_of, find_in_table, place_of, require_hub_id
from sushi_research.data.scan import Scan
from sushi_research.data.tables import open_folder, open_saved
from sushi_research.errors import UserError
from sushi_research.fingerprints import HashCache
from sushi_research.remembered import NOTHING_REMEMBERED

pyarrow = pytest.importorskip("pyarrow")
NO_HASHES = HashCache(Path(os.devnull))


def find(result, table, column):
    images = columns_of(result, table, "image", CaptionRule(column))
    return find_in_table(
        result, images, place_of(images, result.source, NOTHING_REMEMBERED), "train", CaptionRule(column)
    )


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf_cache")
    datasets.disable_progress_bars()


def table(captions: tuple[str, ...] = ("one", "two", "three")):
    import datasets

    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    cells = [{"bytes": b"image %d" % number, "path": None} for number in range(len(captions))]
    return datasets.Dataset.from_dict({"image": cells, "text": list(captions)}, features=features)


def saved(folder: Path) -> Path:
    """A dataset from `save_to_disk`; the path of its arrow file."""
    table().save_to_disk(str(folder))
    return next(folder.glob("*.arrow"))


def damage_offsets(file: Path, value: int) -> None:
    """Replaces the last offset of the captions, which are 3, 3 and 5 letters long."""
    data, offsets = file.read_bytes(), struct.pack("<4i", 0, 3, 6, 11)
    assert data.count(offsets) == 1
    file.write_bytes(data.replace(offsets, struct.pack("<4i", 0, 3, 6, value)))


@pytest.mark.parametrize("value", [2**31 - 1, -1, 2])
def test_an_arrow_file_with_broken_offsets_is_refused(tmp_path, value):
    file = saved(tmp_path / "saved")
    damage_offsets(file, value)
    with pytest.raises(UserError, match=r"the table .*\.arrow is damaged \(.*offset.*\): make it again"):
        open_saved(tmp_path / "saved", "train", NO_HASHES)
    (tmp_path / "folder").mkdir()
    file.rename(tmp_path / "folder" / "train.arrow")
    with pytest.raises(UserError, match=r"the table .*train\.arrow is damaged"):
        open_folder(tmp_path / "folder", "train", NO_HASHES)


def test_captions_that_are_not_utf8_are_refused(tmp_path):
    file = saved(tmp_path / "saved")
    file.write_bytes(file.read_bytes().replace(b"onetwothree", b"onetwo\xffhree"))
    with pytest.raises(UserError, match=r"is damaged \(.*UTF-?8"):
        open_saved(tmp_path / "saved", "train", NO_HASHES)
    import pyarrow.parquet

    (tmp_path / "folder").mkdir()
    table().to_parquet(str(tmp_path / "folder" / "train.parquet"))
    data = (tmp_path / "folder" / "train.parquet").read_bytes()
    plain = pyarrow.parquet.read_table(tmp_path / "folder" / "train.parquet")
    pyarrow.parquet.write_table(plain, tmp_path / "folder" / "train.parquet", compression="none", use_dictionary=False)
    data = (tmp_path / "folder" / "train.parquet").read_bytes()
    (tmp_path / "folder" / "train.parquet").write_bytes(data.replace(b"\x05\0\0\0three", b"\x05\0\0\0\xffhree"))
    rows = open_folder(tmp_path / "folder", "train", NO_HASHES)
    with pytest.raises(UserError, match=r"is damaged \(.*UTF-?8"):
        find(Scan(source="folder"), rows, "text")


def test_a_column_of_nothing_has_no_endless_rows(tmp_path):
    schema = pyarrow.schema([("image", pyarrow.null()), ("text", pyarrow.null())])
    batch = pyarrow.RecordBatch.from_arrays(
        [pyarrow.Array.from_buffers(pyarrow.null(), 2**31 - 1, [None])] * 2, schema=schema
    )
    with pyarrow.OSFile(str(tmp_path / "train.arrow"), "wb") as sink, pyarrow.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(batch)
    with pytest.raises(UserError, match=r"cannot have 2,147,483,647 rows"):
        open_folder(tmp_path, "train", NO_HASHES)


def test_a_caption_column_of_images_is_not_decoded(tmp_path):
    saved(tmp_path)
    result = Scan(source="folder")
    find(result, open_saved(tmp_path, "train", NO_HASHES), "image")
    assert [problem.reason for problem in result.problems] == ["no caption: column image"] * 3


CARDS = {
    "x: !!python/object/apply:os.system ['touch {ran}']": "could not determine a constructor",
    "x: !custom y": "could not determine a constructor",
    "- a": "is not a mapping",
    "a: [": "not valid YAML",
    "x: " + "[" * 3000 + "]" * 3000: "nested more than 100 deep",
    "a: &a [x,x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b,*b]\n"
    "d: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c,*c]\nconfigs: [*d,*d,*d,*d,*d,*d,*d,*d,*d,*d]": "its aliases counted in full",
    "configs: &a [*a]": "nested more than 100 deep",
    "x: " + "y" * 2**21: "letters: shorten it",
    "configs: 5": "Expected configs to be a list",
    "configs: [{config_name: default, data_files: 5}]": "Expected data_files in YAML",
    "dataset_info: {features: [{name: image, dtype: nosuch}]}": "Feature type 'Nosuch' not found",
}


@pytest.mark.parametrize("card", CARDS, ids=range(len(CARDS)))
def test_cards_that_are_no_good_are_refused_and_run_nothing(tmp_path, card):
    folder, ran = tmp_path / "folder", tmp_path / "ran"
    folder.mkdir()
    table().to_parquet(str(folder / "train.parquet"))
    (folder / "README.md").write_text(f"---\n{card.replace('{ran}', str(ran))}\n---\nsushi")
    with pytest.raises(UserError, match=CARDS[card]) as caught:
        open_folder(folder, "train", NO_HASHES)
    assert "\n" not in str(caught.value) and not ran.exists()


def test_a_card_with_a_key_twice_or_the_names_of_many_classes_is_read(tmp_path):
    """As `datasets` reads them: a config of this suite may have neither."""
    folder = tmp_path / "folder"
    folder.mkdir()
    table().to_parquet(str(folder / "train.parquet"))
    (folder / "README.md").write_text(f"---\nlicense: mit\nlicense: mit\nnames: [{'a,' * 20_000}]\n---\nsushi")
    assert open_folder(folder, "train", NO_HASHES).rows["text"] == ["one", "two", "three"]


@pytest.mark.parametrize("name", ["state.json", "dataset_info.json", "data-00000-of-00001.arrow"])
def test_no_fifo_is_waited_for(tmp_path, name):
    saved(tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=f"{name} is a FIFO"):
        open_saved(tmp_path, "train", NO_HASHES)


def test_a_fifo_in_the_place_of_a_dataset_is_called_one(tmp_path):
    os.mkfifo(tmp_path / "photos")
    with pytest.raises(UserError, match="data.path: .*photos is a FIFO: give a folder of images"):
        require_hub_id("photos", tmp_path / "photos", "data.path")
