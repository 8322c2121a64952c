"""Images and captions in an HF dataset: a saved folder, tables in a folder, or a hub id."""

from __future__ import annotations

import difflib
import re
from functools import partial
from pathlib import Path
from typing import Any

from sushi_research import caption_text
from sushi_research.data.images import BadImage
from sushi_research.data.samples import FoundImage, Problem, Scan
from sushi_research.errors import UserError


def find_in_table(result: Scan, rows: Any, split: str, image_column: str, caption_column: str) -> list[FoundImage]:
    """The images and captions of a `datasets.Dataset`, without decoding the images.

    Raises UserError if a column is missing or the image column has no images.
    """
    import datasets

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
    for index, caption in enumerate(rows[caption_column][:]):
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
        images.append(FoundImage(name, text or None, 1, None, partial(_read_cell, cells, image_column, index)))
    if several:
        result.notes.append(f"{several} rows have several captions: the first is used")
    if long:
        result.notes.append(f"{len(long)} rows have a caption of several lines: the first is used ({long[0]})")
    return images


def _read_cell(cells: Any, column: str, index: int) -> bytes:
    """The bytes of a row's image file. Raises BadImage if there is none, OSError if it cannot be read."""
    cell = cells[index][column]
    if cell is None or (cell["bytes"] is None and cell["path"] is None):
        raise BadImage("the row has no image")
    return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()


def load_saved(folder: Path, split: str) -> Any:
    """A split of a dataset from `save_to_disk`. A single `Dataset` counts as the split it came from, or "train" if unknown."""
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, LookupError, TypeError) as error:  # everything that damaged folders were seen to raise
        raise UserError(f"the data set in {folder} cannot be read ({_first_line(error)}): save it again.") from error
    if isinstance(saved, datasets.Dataset):
        own = str(saved.split or "train")
        saved = {own: saved, own.partition("[")[0]: saved}
    if split not in saved:
        raise UserError(f"{folder} has no split {split}: set data.split to one of {', '.join(saved)}.")
    return saved[split]


def load_table(source: str, split: str, revision: str | None) -> Any:
    """A split of a hub dataset, or of a folder with parquet or arrow files. Raises UserError if it cannot be loaded."""
    import datasets

    try:
        return datasets.load_dataset(source, split=split, revision=revision)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"the data set {source} could not be loaded ({_first_line(error)}): check data.path, data.split,"
            " data.revision and, for the hub, your connection and `hf auth login`."
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def require_hub_id(text: str, path: Path) -> None:
    """Raises UserError unless `text`, which is not a folder, is clearly meant as a hub id."""
    if path.exists():
        raise UserError(f"data.path: {text} is a file: give a folder of images, or a hub id such as org/name.")
    if not path.parent.is_dir() and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", text):
        return
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = "".join(f" (there is {path.parent / name})" for name in difflib.get_close_matches(path.name, siblings, n=1))
    raise UserError(f"data.path: there is no {text}{near}: give a folder of images, or a hub id such as org/name.")
