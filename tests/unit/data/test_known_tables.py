"""A table whose content is known is not read again: neither its texts nor which of its rows name files."""

import pytest

from benchmarking.synthetic_rows import save_rows
from sushi_research.data import dataset, hf_dataset
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
