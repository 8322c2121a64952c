"""The files of a data folder that count: images, caption files and metadata, with the state that tells when one has changed."""

from __future__ import annotations

import json
import os
import posixpath
import stat
import time
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow

from sushi_research import fingerprints
from sushi_research.data.masks import masks_beside
from sushi_research.data.metadata_file import METADATA, UNREAD
from sushi_research.data.names import ARCHIVES, CAPTIONS, IMAGES, UNSUPPORTED
from sushi_research.data.scan import Problem, Scan
from sushi_research.data.walk import walk
from sushi_research.fingerprints import content_hash
from sushi_research.remembered import columns_hash

TABLES = {".parquet", ".arrow", ".tar"}
# The size in the state of what is no regular file or not there, and of what cannot be looked at.
NO_FILE, UNKNOWN = -1, -2
_MOST = 2**63 - 1


@dataclass
class FileList:
    """Names of files, relative with /, and their states: four numbers each, as `FileState.key`, and the time they were taken."""

    names: list[str] = field(default_factory=list)
    _numbers: array = field(default_factory=lambda: array("q"))

    def add(self, name: str, path: str) -> None:
        """Adds a file in its state now; call it before reading the file."""
        self.names.append(name)
        seen = time.time_ns()
        try:
            found = os.stat(path)
        except (FileNotFoundError, NotADirectoryError, ValueError):
            self._numbers.extend((NO_FILE, 0, 0, 0, seen))
        except OSError:
            self._numbers.extend((UNKNOWN, 0, 0, 0, seen))
        else:
            size = found.st_size if stat.S_ISREG(found.st_mode) else NO_FILE
            inode = found.st_ino & _MOST
            # A file system can have times that 64 bits of nanoseconds do not have: those before 1678 and after 2262.
            times = (max(-_MOST, min(time_ns, _MOST)) for time_ns in (found.st_mtime_ns, found.st_ctime_ns))
            self._numbers.extend((size, *times, inode, seen))

    def take(self, chosen: np.ndarray) -> FileList:
        """The files where a bool array [N] is true."""
        names = [name for name, is_chosen in zip(self.names, chosen.tolist(), strict=True) if is_chosen]
        return FileList(names, array("q", self._columns[chosen].tobytes()))

    @property
    def states(self) -> np.ndarray:
        """[N, 4] int64: size, modification and change time in nanoseconds, inode."""
        return self._columns[:, :4]

    @property
    def settled(self) -> np.ndarray:
        """[N] bool: whether a file that changes from now on gets another state."""
        times = self._columns[:, 1:3].max(axis=1, initial=0)
        return (self._columns[:, 0] != UNKNOWN) & (self._columns[:, 4] - times > fingerprints.RACY_NS)

    @property
    def _columns(self) -> np.ndarray:
        return np.frombuffer(self._numbers, np.int64).reshape(-1, 5)

    @cached_property
    def column(self) -> pyarrow.Array:
        """The names as an Arrow array."""
        return pyarrow.array(self.names, pyarrow.large_string())


@dataclass
class FolderFiles:
    """The files of the folder `root`. `unsupported` are images of other formats, `unread` metadata files that are not read.

    `odd` has the paths of those names that are not the paths below the root: bytes that are not UTF-8 are shown in another way.
    """

    root: str
    images: FileList = field(default_factory=FileList)
    masks: FileList = field(default_factory=FileList)
    captions: FileList = field(default_factory=FileList)
    metadata: FileList = field(default_factory=FileList)
    unsupported: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    has_tables: bool = False
    odd: dict[str, str] = field(default_factory=dict)

    def path(self, name: str) -> str:
        """The path of a file."""
        return self.odd.get(name) or os.path.join(self.root, name)

    @property
    def settled(self) -> bool:
        """Whether any change of the images, captions and metadata gives another `key`."""
        return all(bool(files.settled.all()) for files in (self.images, self.captions, self.metadata))

    def key(self, options: Iterable[object]) -> str:
        """A hash of all names and states, and of `options`, as 32 hex digits."""
        lists = (self.images, self.captions, self.metadata)
        columns = [column for files in lists for column in (files.column, files.states)]
        others = pyarrow.array([*self.unsupported, "", *self.unread], pyarrow.large_string())
        return content_hash(json.dumps([columns_hash(*columns, others), *options]).encode())


def list_files(result: Scan, root: Path, outputs: Mapping[Path, str], *, with_masks: bool = False) -> FolderFiles:
    """The files below a folder. Others are counted as ignored, and unreadable folders are problems of `result`.

    `with_masks`: images that are masks of others by their names (`masks.masks_beside`) are `masks`, and no `images`.
    """
    files, shown = FolderFiles(str(root)), set()
    for name, path in walk(result, root, outputs):
        if "\\" in name:  # as bytes that are not UTF-8 are shown
            if name in shown:
                result.problems.append(
                    Problem(name, "two files have this name, one with bytes that are not UTF-8: rename it")
                )
                continue
            shown.add(name)
            if os.path.join(files.root, name) != path:
                files.odd[name] = path
        suffix = posixpath.splitext(name)[1].lower()
        if suffix in IMAGES:
            files.images.add(name, path)
        elif suffix in CAPTIONS:
            files.captions.add(name, path)
        elif posixpath.basename(name) == METADATA:
            files.metadata.add(name, path)
        elif suffix in UNSUPPORTED:
            files.unsupported.append(name)
        else:
            result.ignored += 1
            files.has_tables = files.has_tables or suffix in TABLES
            if suffix in ARCHIVES:
                result.notes.append(f"{name}: an archive, which is not read: unpack it")
            if posixpath.basename(name).lower() in UNREAD:
                files.unread.append(name)
    if with_masks:
        masks = {mask for masks in masks_beside(files.images.names).values() for mask in masks}
        is_mask = np.array([name in masks for name in files.images.names], bool)
        files.images, files.masks = files.images.take(~is_mask), files.images.take(is_mask)
    return files
