"""Images and captions in the rows of an HF dataset."""

from __future__ import annotations

import difflib
import os
import re
from functools import partial
from pathlib import Path
from typing import Any

from sushi_research import caption_text
from sushi_research.data.names import composed
from sushi_research.data.samples import FoundImage, Problem, Scan
from sushi_research.data.tables import Table, read_image
from sushi_research.errors import UserError, first_line
from sushi_research.user_files import kind_of


def find_in_table(result: Scan, table: Table, split: str, image_column: str, caption_column: str) -> list[FoundImage]:
    """The images and captions of a table, without decoding the images.

    Raises UserError if a column is missing or the image column has no images.
    """
    import datasets

    rows = table.rows
    columns = ", ".join(rows.column_names)
    for key, column in (("data.image_column", image_column), ("data.caption_column", caption_column)):
        if column not in rows.column_names:
            raise UserError(f"{result.source} has no column {column}: set {key} to one of {columns}.")
    try:
        cells = rows.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
    except (TypeError, ValueError, NotImplementedError):
        message = f"the column {image_column} of {result.source} holds no images: set data.image_column to one of"
        raise UserError(f"{message} {columns}.") from None
    images, several, long = [], 0, []
    for index, caption in enumerate(_texts(rows, caption_column, result.source)):
        name = f"{split}[{index}]"
        if isinstance(caption, list) and caption:
            several += len(caption) > 1
            caption = caption[0]
        reason, text = "no caption", ""
        if isinstance(caption, str):
            try:
                text, lines = caption_text.first_line(caption)
                reason = "its caption is empty"
                long += [name] if lines > 1 else []
            except caption_text.NotText as error:
                reason = f"its caption {error.reason}"
        if not text:
            result.problems.append(Problem(name, f"{reason}: column {caption_column}"))
        images.append(
            FoundImage(name, text or None, 1, None, partial(_read, cells, index, image_column, table.folders))
        )
    if several:
        have = "1 row has" if several == 1 else f"{several} rows have"
        result.notes.append(f"{have} several captions, of which only the first is used")
    if long:
        have = "1 row has" if len(long) == 1 else f"{len(long)} rows have"
        result.notes.append(f"{have} a caption of several lines, of which only the first is used (first: {long[0]})")
    return images


def _texts(rows: Any, column: str, source: str) -> list[Any]:
    """The values of a column as they are stored: what is no text, such as an image, is not decoded."""
    try:
        rows.data.table.validate(full=True)  # parquet does not check that texts are UTF-8
        return rows.with_format("arrow")[column][:].to_pylist()
    except (ValueError, TypeError, OverflowError, NotImplementedError) as error:
        raise UserError(f"{source} is damaged ({first_line(error)}): make it again, or download it again.") from None


def _read(cells: Any, index: int, column: str, folders: tuple[Path, ...]) -> bytes:
    return read_image(cells[index][column], folders)


def require_hub_id(text: str, path: Path, key: str) -> None:
    """Raises UserError unless `text`, which is not a folder and the value of `key`, is clearly meant as a hub id."""
    if os.path.exists(path):
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
