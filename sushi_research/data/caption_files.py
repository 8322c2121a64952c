"""Reads caption files, and remembers what is in each as long as its state is the same."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.compute

from sushi_research import caption_text
from sushi_research.data.folder_files import FolderFiles
from sushi_research.fingerprints import content_hash
from sushi_research.progress import progress
from sushi_research.remembered import Remembered
from sushi_research.user_files import UnreadableFile, read_regular

# Increment it when the same file gives other captions.
VERSION = 1
# So many files take a second or more, so that their progress is shown.
_MANY = 20_000


@dataclass
class CaptionFiles:
    """The captions in files, by their row in the list of files, and why those without have none; [] of a blank file.

    `lasting`: whether files in the same state give the same; not if one could not be read.
    """

    texts: dict[int, tuple[str, ...]] = field(default_factory=dict)
    problems: dict[int, str] = field(default_factory=dict)
    lasting: bool = True


def read_captions(files: FolderFiles, rows: Sequence[int], remembered: Remembered) -> CaptionFiles:
    """Reads the caption files `rows` of a folder that are not remembered."""
    key = content_hash(f"{VERSION} {files.root}".encode("utf-8", "surrogateescape"))
    found = CaptionFiles()
    _recall(found, files, remembered, key)
    unknown = [row for row in rows if row not in found.texts and row not in found.problems]
    if not unknown:
        return found
    passing = set()
    try:
        for row in progress(
            unknown, description="reading captions", unit="file", disable=len(unknown) < _MANY, leave=False
        ):
            path = Path(files.path(files.captions.names[row]))
            try:
                found.texts[row] = caption_text.lines(caption_text.decode(read_regular(path, caption_text.MOST_BYTES)))
            except caption_text.NotText as error:
                found.problems[row] = error.reason
            except UnreadableFile as error:
                found.problems[row] = error.reason
                passing.add(row)
    finally:  # what was read counts if the rest is interrupted
        found.lasting = not passing
        with contextlib.suppress(MemoryError):
            _store(found, passing, files, remembered, key)
    return found


def _recall(found: CaptionFiles, files: FolderFiles, remembered: Remembered, key: str) -> None:
    stored = remembered.find("caption-files", key)
    if stored is None:
        return
    # Where each stored file is now.
    places = pyarrow.compute.index_in(stored["names"], value_set=files.captions.column).fill_null(-1).to_numpy()
    states = files.captions.states
    same = (places >= 0) & (states[places] == stored["states"]).all(axis=1) if len(states) else places >= 0
    kept = np.flatnonzero(same)
    texts = stored["texts"].take(pyarrow.array(kept)).to_pylist()
    problems = stored["problems"].take(pyarrow.array(kept)).to_pylist()
    for row, lines, problem in zip(places[kept].tolist(), texts, problems, strict=True):
        if problem is None:
            found.texts[row] = tuple(lines)
        else:
            found.problems[row] = problem


def _store(found: CaptionFiles, passing: set[int], files: FolderFiles, remembered: Remembered, key: str) -> None:
    settled = files.captions.settled
    rows = sorted(row for row in (*found.texts, *found.problems) if settled[row] and row not in passing)
    texts = pyarrow.array([found.texts.get(row, ()) for row in rows], pyarrow.large_list(pyarrow.large_string()))
    columns = {
        "names": files.captions.column.take(pyarrow.array(rows, pyarrow.int64())),
        "states": files.captions.states[rows],
        "texts": texts,
        "problems": pyarrow.array([found.problems.get(row) for row in rows], pyarrow.large_string()),
    }
    remembered.put("caption-files", key, columns)
