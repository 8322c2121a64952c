"""A table whose content is known is not read again: neither its texts nor which of its rows name files."""

import pytest

from benchmarking.synthetic_rows import save_rows
from sushi_research import fingerprints
from sushi_research.data import dataset, hf_dataset, tables
from sushi_research.errors import UserError
from sushi_research.remembered import Remembered


def test_the_rows_of_a_known_table_are_not_read(tmp_path, monkeypatch):
    data, remembered = save_rows(tmp_path / "rows", 20), Remembered(tmp_path / "remembered")
    options = {"split": "train", "image_column": "image", "caption_column": "text", "revision": None}
    first = dataset.scan(data, **options, remembered=remembered, show_progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(hf_dataset, "_chunks", lambda *args: pytest.fail("the table was read"))
        again = dataset.scan(data, **options, remembered=remembered, show_progress=False)
    assert len(first.samples) == 20 and again.samples.names.equals(first.samples.names)
    assert [sample.read() for sample in again.samples] == [sample.read() for sample in first.samples]


def test_a_known_saved_table_is_opened_when_an_image_is_read(tmp_path, monkeypatch):
    data, remembered = save_rows(tmp_path / "rows", 20), Remembered(tmp_path / "remembered")
    options = {"split": "train", "image_column": "image", "caption_column": "text", "revision": None}
    monkeypatch.setattr(fingerprints, "RACY_NS", -(10**18))  # the files are just written
    first = dataset.scan(data, **options, remembered=remembered, show_progress=False)
    opened = []
    original = tables._saved_rows
    monkeypatch.setattr(tables, "_saved_rows", lambda *arguments: opened.append(arguments) or original(*arguments))
    again = dataset.scan(data, **options, remembered=remembered, show_progress=False)
    assert opened == [] and list(again.samples) == list(first.samples)
    assert again.samples[3].read() == first.samples[3].read() and len(opened) == 1
    with pytest.raises(UserError, match="has no split other: set data.split to one of train"):
        dataset.scan(data, **options | {"split": "other"}, remembered=remembered, show_progress=False)
