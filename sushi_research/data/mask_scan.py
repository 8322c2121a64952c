"""Finds and checks the masks of the images of a scan: from their transparency, from files, or from a column of the table."""

from __future__ import annotations

import json
import os
import posixpath
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow

from sushi_research.config.masks import MaskSection
from sushi_research.data import masks as rules
from sushi_research.data.assembling import TRANSPARENT
from sushi_research.data.checking import Facts, Place, check
from sushi_research.data.folder_files import NO_FILE, FolderFiles, list_files
from sushi_research.data.hf_dataset import TableImages, place_of, row_names
from sushi_research.data.image_folder import ImageFiles
from sushi_research.data.samples import Sample, Samples
from sushi_research.data.scan import Problem, Problems, Scan
from sushi_research.errors import UserError, some
from sushi_research.fingerprints import content_hash
from sushi_research.remembered import Array, Remembered, columns_hash

# Increment it when the same files give other masks or problems.
_VERSION = 1


@dataclass(frozen=True)
class MaskFiles:
    """Reads the mask of an image by the image's row: `rows` [N] is the number of its file in `files`."""

    files: ImageFiles
    rows: np.ndarray

    def __call__(self, row: int) -> bytes:
        """The bytes of a mask. Raises UnreadableFile."""
        return self.files(int(self.rows[row]))


def add_masks(
    result: Scan, images: FolderFiles | TableImages, masks: MaskSection, remembered: Remembered, progress: bool
) -> None:
    """Gives the samples of a scan their masks, as `masks` says. Those without a usable mask become problems.

    Masks that are not `remembered` are decoded; `progress` shows that. Raises UserError if there can be no masks of that kind.
    """
    is_table = isinstance(images, TableImages)
    if masks.source == "alpha":
        samples = Samples.of(result.samples)
        result.samples = samples.with_masks(rules.alpha_hashes(samples.images), None)
        if len(samples) and not any(TRANSPARENT in note for note in result.notes):
            result.notes.append("masks.source is alpha, but no image is transparent: the masks are white all over")
    elif masks.source == "files" and not is_table:
        _from_files(result, images, masks, remembered, progress)
    elif masks.source == "column" and is_table:
        _from_column(result, images, masks, remembered, progress)
    elif masks.source != "none":
        what, instead = ("is an HF dataset", "column") if is_table else ("holds image files", "files")
        raise UserError(
            f"masks.source is {masks.source}, but {result.source} {what}, which has no such masks: set it to {instead} or alpha."
        )


def _from_column(result: Scan, images: TableImages, masks: MaskSection, remembered: Remembered, progress: bool) -> None:
    """Takes the masks of a table's rows from the column `masks.column`. UserError if there is none with images."""
    columns, column = images.table.column_names, TableImages(images.table, masks.column, "masks.column")
    if masks.column not in columns:
        raise UserError(
            f"{result.source} has no column {masks.column}: set masks.column to one of {', '.join(columns)}."
        )
    place = place_of(column, result.source, remembered)
    rows = np.arange(len(images.table))
    names = row_names(masks.column, len(rows))
    facts = check(place, names, remembered, progress)
    _take(result, facts, rows, names, masks, {}, column)


def _from_files(result: Scan, files: FolderFiles, masks: MaskSection, remembered: Remembered, progress: bool) -> None:
    """Finds the mask files of a folder's images: those of `files.masks`, which are next to them, or those in `masks.folder`."""
    found, root, odd = files.masks, files.root, files.odd
    if masks.folder is not None:
        root = os.path.abspath(masks.folder)
        if not os.path.isdir(root):
            raise UserError(f"masks.folder: there is no folder {masks.folder}: give the folder that has the masks.")
        if os.path.realpath(root) == os.path.realpath(files.root):
            raise UserError(
                f"masks.folder is the folder of the images, {masks.folder}: leave it out for masks next to the images, or give the "
                "folder that has the masks."
            )
        listed = list_files(Scan(root), Path(root), {})
        found, odd = listed.images, listed.odd
    key = columns_hash(files.images.column, found.column)
    key = content_hash(json.dumps([_VERSION, key, masks.folder]).encode())
    match = remembered.arrays("mask-files", key, lambda: _match(files.images.names, found.names, masks.folder))
    problems = dict(zip(match["rows"].tolist(), match["problems"].to_pylist(), strict=True))
    used = np.isin(np.arange(len(found.names)), match["of_image"][Samples.of(result.samples).rows])
    read = ImageFiles(root, found.column, odd)
    place = Place(
        content_hash(f"masks {root}".encode("utf-8", "surrogateescape")),
        read,
        read.path,
        found.states,
        found.settled,
        used & (found.states[:, 0] != NO_FILE),
        found.column,
    )
    facts = check(place, found.column, remembered, progress)
    source = MaskFiles(read, match["of_image"])
    _take(result, facts, match["of_image"], found.column, masks, problems, source)


def _match(images: Sequence[str], found: Sequence[str], folder: str | None) -> dict[str, Array]:
    """`of_image`, the number of each image's mask file, or -1; and the problems of the image `rows` that have none or several."""
    number_of = {name: number for number, name in enumerate(found)}
    of_image, problems = np.full(len(images), -1), {}
    stems = [posixpath.splitext(name)[0] for name in images]
    if folder is None:
        masks, keys = rules.masks_beside([*images, *found]), images
        where = "there is no {0}-masklabel.png, {0}.mask.png or {0}_mask.png"
    else:
        masks, keys, where = rules.masks_in_folder(found, stems), stems, f"there is no {{0}}.png in {folder}"
    for row, (key, stem) in enumerate(zip(keys, stems, strict=True)):
        names = masks.get(key, [])
        if len(names) == 1:
            of_image[row] = number_of[names[0]]
        else:
            several = f"several masks, {some(names, 3)}: keep one of them"
            problems[row] = several if names else f"no mask: {where.format(stem)}"
    rows, texts = np.array([*problems], np.int64), pyarrow.array([*problems.values()], pyarrow.large_string())
    return {"of_image": of_image, "rows": rows, "problems": texts}


def _take(
    result: Scan,
    facts: Facts,
    of_image: np.ndarray,
    names: pyarrow.Array,
    masks: MaskSection,
    problems: Mapping[int, str],
    source: Callable[[int], bytes],
) -> None:
    """Gives the samples of a scan their masks; those whose mask cannot be used become problems.

    `of_image` is the number of each image's mask in `facts` and `names`, -1 for those in `problems`, by the row of the image.
    """
    samples = Samples.of(result.samples)
    own = of_image[samples.rows]  # [N]; where it is -1 the last mask is looked at, and not used
    bad = own < 0
    if len(names):
        bad |= ~facts.usable[own] | facts.transparent[own]
        bad |= (facts.widths[own] != samples.widths) | (facts.heights[own] != samples.heights)
        bad |= (facts.fingerprints[own] == (255 if masks.invert else 0)).all(axis=1)
    lost = samples.take(bad)
    found = []
    for sample, row, mask in zip(lost, lost.rows.tolist(), own[bad].tolist(), strict=True):
        reason = problems.get(row) or _reason(sample, facts, mask, names[mask].as_py(), masks.invert)
        found.append(Problem(sample.name, reason))
    result.problems = Problems.of(result.problems, found)
    kept = samples.take(~bad)
    result.samples = kept.with_masks(facts.images[own[~bad]], source)


def _reason(sample: Sample, facts: Facts, mask: int, name: str, invert: bool) -> str:
    """Why the mask of a sample cannot be used."""
    width, height = int(facts.widths[mask]), int(facts.heights[mask])
    if not facts.usable[mask]:
        return f"its mask cannot be used, {facts.texts['problem'].get(mask, 'not a file: a broken link?')}: {name}"
    if facts.transparent[mask]:
        return f"its mask is transparent: save {name} in black and white, without transparency"
    if (width, height) != (sample.width, sample.height):
        return f"its mask has {width}x{height} pixels, and the image {sample.width}x{sample.height}: {name}"
    colour = "white, and masks.invert is on" if invert else "black"
    return f"its mask is all {colour}, so nothing would be learned: {name}"
