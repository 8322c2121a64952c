"""Images and captions in the rows of an HF dataset."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute

from sushi_research import caption_text
from sushi_research.data.checking import Place
from sushi_research.data.folder_files import FileList
from sushi_research.data.found import CAPTIONS, CaptionRule, Found
from sushi_research.data.names import ARCHIVES, composed, in_any_form
from sushi_research.data.scan import Problem, Scan
from sushi_research.data.tables import Table, read_image
from sushi_research.errors import UserError, first_line
from sushi_research.fingerprints import content_hash
from sushi_research.remembered import Array, Remembered, columns_hash
from sushi_research.user_files import kind_of

# Rows whose captions are Python objects at the same time.
_AT_A_TIME = 10_000


@dataclass(frozen=True)
class TableImages:
    """The image column of a table: reads the bytes of an image by its row."""

    table: Table
    column: str
    key: str = "data.image_column"

    def require_images(self, source: str) -> None:
        """Raises UserError if the column holds no images. `key` is the setting that its name is the value of."""
        try:
            self.cells  # noqa: B018 (it is made here)
        except (TypeError, ValueError, NotImplementedError):
            message = f"the column {self.column} of {source} holds no images: set {self.key} to one of"
            raise UserError(f"{message} {', '.join(self.table.column_names)}.") from None

    @cached_property
    def cells(self) -> Any:
        """The column as a dataset that does not decode. Raises what `datasets` raises for a column without images."""
        import datasets

        return self.table.rows.select_columns([self.column]).cast_column(self.column, datasets.Image(decode=False))

    def __call__(self, row: int) -> bytes:
        """The bytes of an image. Raises BadImage or OSError."""
        return read_image(self.cells[row][self.column], self.table.folders)

    def files(self) -> Iterator[tuple[int, str]]:
        """(row, name) of the images that are not in the rows, but in files that the rows name."""
        start = 0
        for chunk in _chunks(self.cells, self.column):
            outside = np.flatnonzero(chunk.field("bytes").is_null().to_numpy(zero_copy_only=False))
            if len(outside):
                chunk.field("path").validate(full=True)
            for row in outside.tolist():
                name = chunk.field("path")[row].as_py()
                if name is not None:
                    yield start + row, name
            start += len(chunk)


def columns_of(result: Scan, table: Table, image_column: str, rule: CaptionRule) -> TableImages:
    """The image column of a table. Raises UserError if a column is missing."""
    columns = ", ".join(table.column_names)
    for key, column in (("data.image_column", image_column), ("data.caption_column", rule.column)):
        if column not in table.column_names:
            raise UserError(f"{result.source} has no column {column}: set {key} to one of {columns}.")
    if rule.source != "files":
        raise UserError(
            f"captions.source is {rule.source}, but {result.source} is an HF dataset, whose rows have no such names: leave it out, "
            "and set data.caption_column."
        )
    return TableImages(table, image_column)


def place_of(images: TableImages, source: str, remembered: Remembered) -> Place:
    """Where the images of a table are read. Those in its rows are known by the content of the table. Raises UserError if it is
    damaged, or the column holds no images.

    Which rows name files is remembered, so that a table that is known is not read. Where these files are is not: a link may lead to
    another one now.
    """
    size, table = len(images.table), images.table
    states, settled, files = np.zeros((size, 4), np.int64), np.ones(size, bool), FileList()

    def make() -> dict[str, Array]:
        images.require_images(source)
        with _undamaged(source):
            found = list(images.files())
        names = pyarrow.array([name for _, name in found], pyarrow.large_string())
        return {"rows": np.array([row for row, _ in found], np.int64), "names": names}

    options = ["names of files", table.content, table.about, images.column]
    known = remembered.arrays("table-files", content_hash(json.dumps(options).encode()), make)
    rows, version = known["rows"], ""
    for file_name in known["names"].to_pylist():
        files.add("", str(in_any_form(table.folders[0], file_name)))
    if len(rows):
        states[rows], settled[rows] = files.states, files.settled
        version = columns_hash(rows, files.states)
    name = content_hash(json.dumps(["table", table.content, images.column]).encode())
    return Place(name, images, _no_path, states, settled, np.ones(size, bool), version=version)


def row_names(name: str, count: int) -> pyarrow.Array:
    """The names of a table's rows, `name[0]` and so on, as an Arrow array."""
    numbers = pyarrow.array(np.arange(count)).cast(pyarrow.large_string())
    begin, end, separator = (pyarrow.scalar(text, pyarrow.large_string()) for text in (f"{name}[", "]", ""))
    return pyarrow.compute.binary_join_element_wise(begin, numbers, end, separator)


def find_in_table(result: Scan, images: TableImages, place: Place, split: str, rule: CaptionRule) -> Found:
    """The images and captions of a table, without decoding the images. Problems and notes are added to `result`."""
    rows = images.table.rows
    names = row_names(split, len(rows))
    parts, problems = [pyarrow.array([], CAPTIONS)], []
    for values in read_column(rows, rule.column, result.source):
        texts = []
        for value in values:
            lines, reason = _lines(value, rule.allow_empty)
            if reason is not None:
                row = sum(map(len, parts)) + len(texts)
                problems.append(Problem(f"{split}[{row}]", f"{reason}: column {rule.column}"))
            texts.append(lines)
        parts.append(pyarrow.array(texts, CAPTIONS))
    result.problems += problems
    return Found(names, pyarrow.concat_arrays(parts), np.ones(len(rows), np.int32), place)


def _lines(value: Any, allow_empty: bool) -> tuple[tuple[str, ...] | None, str | None]:
    """(captions, None) of a cell, which has a text or a list of texts; (None, reason) if it has none."""
    texts = value if isinstance(value, list) else [value]
    if value is None or not texts:
        return (("",), None) if allow_empty else (None, "no caption")
    if not all(isinstance(text, str) for text in texts):
        return None, "one of its captions is no text" if len(texts) > 1 else "no caption"
    try:
        lines = tuple(line for text in texts for line in caption_text.lines(text))
    except caption_text.NotText as error:
        return None, f"its caption {error.reason}"
    if not lines and not allow_empty:
        return None, "its caption is empty"
    return lines or ("",), None


def read_column(rows: Any, column: str, source: str) -> Iterator[list[Any]]:
    """The values of a column as they are stored, some thousand at a time: what is no text, such as an image, is not decoded."""
    with _undamaged(source):
        rows.data.table.validate(full=True)  # parquet does not check that texts are UTF-8
        for chunk in _chunks(rows, column):
            for start in range(0, len(chunk), _AT_A_TIME):
                yield chunk[start : start + _AT_A_TIME].to_pylist()


@contextmanager
def _undamaged(source: str) -> Iterator[None]:
    """Turns what Arrow and `datasets` raise for damaged columns into a UserError."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, TypeError, OverflowError, NotImplementedError) as error:
        raise UserError(f"{source} is damaged ({first_line(error)}): make it again, or download it again.") from None


def _chunks(rows: Any, column: str) -> list[pyarrow.Array]:
    values = rows.with_format("arrow")[column][:]
    return values.chunks if isinstance(values, pyarrow.ChunkedArray) else [values]


def _no_path(row: int) -> None:
    """The images are in the rows."""


def require_hub_id(text: str, path: Path, key: str) -> None:
    """Raises UserError unless `text`, which is not a folder and the value of `key`, is clearly meant as a hub id."""
    if os.path.exists(path):
        if path.suffix.lower() in ARCHIVES | {".tar"}:
            raise UserError(f"{key}: {text} is an archive, which is not read: unpack it, and give the folder.")
        raise UserError(f"{key}: {text} is {kind_of(path)}: give a folder of images, or a hub id such as org/name.")
    if not os.path.isdir(path.parent) and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", text):
        return
    try:
        siblings = os.listdir(path.parent)
    except OSError:
        siblings = []
    same = [name for name in siblings if composed(name) == composed(path.name)]
    found = same or difflib.get_close_matches(path.name, siblings, n=1)
    near = f" (there is {path.parent / found[0]}{', in another Unicode form' if same else ''})" if found else ""
    raise UserError(f"{key}: there is no {text}{near}: give a folder of images, or a hub id such as org/name.")
