"""The boxes of images that are used in part: from a column of a table, or from the lines of metadata.jsonl files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow

from sushi_research.data import metadata_file
from sushi_research.data.folder_files import FolderFiles
from sushi_research.data.found import Found
from sushi_research.data.hf_dataset import TableImages, read_column
from sushi_research.data.names import Names
from sushi_research.data.scan import Problem, Scan
from sushi_research.errors import UserError


def with_boxes(result: Scan, found: Found, images: FolderFiles | TableImages, column: str) -> Found:
    """The images with the boxes in `column`. An image without a usable box becomes a problem of `result`."""
    values = _of_table(images, column, result.source) if isinstance(images, TableImages) else _of_files(images, column)
    where = "" if isinstance(images, TableImages) else f" in a {metadata_file.METADATA}"
    boxes, without = np.zeros((len(found.names), 4), np.int32), []
    for row, name in enumerate(found.names.to_pylist()):
        value = values.get(name if isinstance(images, FolderFiles) else row)
        box = _box(value)
        if box is None:
            has = "no box" if value is None else f"its box is {metadata_file.shown(str(value))}"
            reason = f"{has}: write {column}{where} as [left, top, right, bottom] in pixels"
            result.problems.append(Problem(name, reason))
            without.append(row)
        else:
            boxes[row] = box
    usable = np.ones(len(boxes), bool)
    usable[without] = False
    captions = found.captions.to_pylist()
    kept = pyarrow.array(
        [each if use else None for each, use in zip(captions, usable, strict=True)], found.captions.type
    )
    return replace(found, captions=kept, boxes=boxes)


def beyond(boxes: np.ndarray, widths: np.ndarray, heights: np.ndarray) -> np.ndarray:
    """[N] bool: whether a box [N, 4] has no area, or is not within the image of this size."""
    left, top, right, bottom = boxes.T
    return (left < 0) | (top < 0) | (right <= left) | (bottom <= top) | (right > widths) | (bottom > heights)


def _box(value: Any) -> tuple[int, ...] | None:
    """Four numbers, rounded to whole pixels; None for anything else."""
    if not isinstance(value, list) or len(value) != 4:
        return None
    if not all(type(each) in (int, float) and math.isfinite(each) and abs(each) < 2**30 for each in value):
        return None
    return tuple(round(each) for each in value)


def _of_files(files: FolderFiles, column: str) -> Mapping[str, Any]:
    """The values of `column` in the metadata files of a folder, by image. The captions' reader tells which lines are unusable."""
    images, found = Names(files.images.names), {}
    for file in files.metadata.names:
        for line in metadata_file.read(file, Path(files.path(file)), images, column, values=True):
            if isinstance(line, metadata_file.Value):
                found[line.image] = line.value
    return found


def _of_table(images: TableImages, column: str, source: str) -> Mapping[int, Any]:
    """The values of a column by row. UserError if there is none."""
    names = images.table.column_names
    if column not in names:
        raise UserError(f"{source} has no column {column}: set data.crop_column to one of {', '.join(names)}.")
    return dict(enumerate(value for values in read_column(images.table.rows, column, source) for value in values))
