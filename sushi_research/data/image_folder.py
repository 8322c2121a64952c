"""Finds images and captions in a folder: caption files, metadata.jsonl, names of folders, and kohya's repeat folders."""

from __future__ import annotations

import os
import posixpath
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow

from sushi_research import caption_text
from sushi_research.data import metadata_file
from sushi_research.data.caption_files import read_captions
from sushi_research.data.checking import Place
from sushi_research.data.folder_files import NO_FILE, FolderFiles
from sushi_research.data.found import CAPTIONS, CaptionRule, Found
from sushi_research.data.images import MAX_BYTES
from sushi_research.data.masks import masks_beside
from sushi_research.data.metadata_file import FORMS, METADATA, Entry, Miss, Unusable
from sushi_research.data.names import Names, composed
from sushi_research.data.scan import Problem, Scan
from sushi_research.errors import some
from sushi_research.fingerprints import content_hash
from sushi_research.remembered import Remembered
from sushi_research.user_files import read_regular

Texts = tuple[str, ...]


@dataclass(frozen=True)
class ImageFiles:
    """Reads the images of a folder by their number in `names`. `odd` is that of `FolderFiles`."""

    root: str
    names: pyarrow.Array
    odd: Mapping[str, str]

    def path(self, row: int) -> str:
        """The path of an image."""
        name = self.names[row].as_py()
        return self.odd.get(name) or os.path.join(self.root, name)

    def __call__(self, row: int) -> bytes:
        """The bytes of an image. Raises UnreadableFile."""
        return read_regular(Path(self.path(row)), MAX_BYTES)


def find_in_folder(
    result: Scan, files: FolderFiles, rule: CaptionRule, remembered: Remembered, box_column: str | None = None
) -> Found:
    """The images of a folder with their captions. Problems and notes are added to `result`.

    Lines of metadata that have a box in `box_column` need no caption.
    """
    images = files.images.names
    result.problems += [
        Problem(name, f"{posixpath.splitext(name)[1].lower()} is not supported: convert it to png")
        for name in files.unsupported
    ]
    captions = _Captions(images, allow_empty=rule.allow_empty)
    if rule.source == "files":
        stray = captions.read_files(result, files, remembered)
        captions.read_metadata(result, files, rule.column, box_column)
    else:
        stray = Names([])
        captions.take_names(files.root, rule.source)
        unread = len(files.captions.names) + (len(files.metadata.names) if box_column is None else 0)
        if unread:
            what = "1 caption file is" if unread == 1 else f"{unread} caption files are"
            result.notes.append(f"{what} not read, because captions.source is {rule.source}")
    unread_hint = f" ({files.unread[0]} is not read: write a {METADATA})" if files.unread else ""
    masks = {mask for names in masks_beside(images).values() for mask in names}
    texts: list[Texts | None] = []
    repeats = np.ones(len(images), np.int32)
    states = files.images.states
    for row, name in enumerate(images):
        repeat_folder, repeats[row] = repeats_of(name)
        reason = captions.problem(name)
        if not captions.of[name] and reason is None:
            stem, near = posixpath.splitext(name)[0], stray.near(name, posixpath.dirname(name))
            reason = f"no caption: there is no {stem}.txt, {stem}.caption or entry in a {METADATA}"
            if name in masks:
                reason += " (is it a mask? set masks.source to files)"
            else:
                reason += f" (there is {near[0]})" if near else unread_hint
        if repeats[row] == 0:
            reason = f"its folder asks for no repeats: {repeat_folder}"
        if reason is not None:
            result.problems.append(Problem(name, reason))
        texts.append(None if reason is not None else next(iter(captions.of[name].values())))
    no_file = np.flatnonzero(states[:, 0] == NO_FILE).tolist()
    result.problems += [Problem(images[row], "not a file: a broken link?") for row in no_file]
    names = files.images.column
    read = ImageFiles(files.root, names, files.odd)
    place = Place(
        content_hash(f"folder {files.root}".encode("utf-8", "surrogateescape")),
        read,
        read.path,
        states,
        files.images.settled,
        states[:, 0] != NO_FILE,
        names,
    )
    return Found(names, pyarrow.array(texts, CAPTIONS), repeats, place, captions.lasting)


class _Captions:
    """The captions of images: `of` an image, by source, and the reasons why an image has none that can be used.

    `lasting`: whether the same files give the same; not if one of them could not be read.
    """

    def __init__(self, images: Iterable[str], allow_empty: bool) -> None:
        self.of: dict[str, dict[str, Texts]] = {name: {} for name in images}
        self.lasting = True
        self._allow_empty = allow_empty
        self._unreadable: dict[str, str] = {}
        self._reasons: dict[str, str] = {}  # for images without any caption
        self._names = Names(self.of)

    def read_files(self, result: Scan, files: FolderFiles, remembered: Remembered) -> Names:
        """Reads the caption files of the images with the same stems. Returns those that have no image."""
        stems = Names(posixpath.splitext(name)[0] for name in [*self.of, *files.unsupported])
        own: dict[str, list[int]] = defaultdict(list)
        stray: dict[str, list[str]] = defaultdict(list)
        for row, name in enumerate(files.captions.names):
            stem = posixpath.splitext(name)[0]
            fitting = stems.matching(stem)
            if len(fitting) == 1:
                own[fitting[0]].append(row)
            else:
                stray[stem].append(name)
        for stem, names in stray.items():
            fitting = stems.matching(stem)
            what = f"{len(fitting)} images whose names {FORMS}" if fitting else ""
            result.notes += [f"{name}: a caption {f'of {what}' if what else 'without an image'}" for name in names]
            if fitting:
                reason = f"no caption: {some(names)} fits {what}: rename one of them"
                meant = set(fitting)
                self._reasons |= {name: reason for name in self.of if posixpath.splitext(name)[0] in meant}
        read = read_captions(files, sorted(row for rows in own.values() for row in rows), remembered)
        self.lasting = read.lasting
        for name in self.of:
            for row in own.get(posixpath.splitext(name)[0], ()):
                source = files.captions.names[row]
                if (reason := read.problems.get(row)) is not None:
                    self._unreadable[name] = f"its caption {reason}: {source}"
                else:
                    self.of[name][source] = read.texts[row]
        return Names(name for names in stray.values() for name in names)

    def read_metadata(self, result: Scan, files: FolderFiles, caption_column: str, also: str | None) -> None:
        """Reads metadata files. What cannot be used is added to the problems. `also` is that of `metadata_file.read`."""
        misses = []
        for file in files.metadata.names:
            for line in metadata_file.read(file, Path(files.path(file)), self._names, caption_column, also=also):
                if isinstance(line, Entry):
                    self.of[line.image][line.source] = line.captions
                elif isinstance(line, Miss):
                    misses.append(line)
                elif isinstance(line, Unusable):
                    result.problems.append(Problem(line.source, line.reason))
                    self._reasons = dict.fromkeys(line.images, line.of_image) | self._reasons
                else:
                    result.problems.append(line)
                    self.lasting = self.lasting and line.name != file
        without = {name for name, captions in self.of.items() if not captions and self.problem(name) is None}
        problems, reasons = metadata_file.explain(misses, self._names, without)
        result.problems += problems
        self._reasons |= reasons

    def take_names(self, root: str, source: str) -> None:
        """Takes the name of the folder, without its repeats, or that of the file as the caption of each image."""
        for name in self.of:
            stem = posixpath.splitext(posixpath.basename(name))[0]
            folder = posixpath.basename(posixpath.dirname(name)) or os.path.basename(root)
            text = re.sub(r"^\d{1,3}_(?=.)", "", folder) if source == "folder" else stem
            try:
                self.of[name][name] = caption_text.lines(text)
            except caption_text.NotText as error:
                self._unreadable[name] = (
                    f"its caption, the name of its {'file' if source == 'name' else 'folder'}, {error.reason}"
                )

    def problem(self, image: str) -> str | None:
        """The reason why the captions of an image cannot be used; None if they can, or if nothing is known of any."""
        captions = self.of[image]
        if image in self._unreadable or not captions:
            reason = self._unreadable.get(image) or self._reasons.get(image)
            if reason is None and self._allow_empty:
                captions[image] = ("",)
            return reason
        if len(captions) > 1 and len(set(captions.values())) > 1:
            forms = f", names that {FORMS}" if len(set(map(composed, captions))) < len(captions) else ""
            return f"captions that differ: {' and '.join(captions)}{forms}"
        if not all(captions.values()):
            if self._allow_empty:
                self.of[image] = dict.fromkeys(captions, ("",))
                return None
            return f"its caption is empty: {' and '.join(captions)}"
        return None


def repeats_of(name: str) -> tuple[str, int]:
    """(folder, repeats) of the nearest parent folder named like 10_cats, or ("", 1) without one."""
    return _repeats_of_folder(posixpath.dirname(name))


@lru_cache(maxsize=4096)
def _repeats_of_folder(path: str) -> tuple[str, int]:
    for folder in (path, *map(str, PurePosixPath(path).parents)):
        match = re.match(r"(\d{1,3})_.", posixpath.basename(folder))
        if match:
            return folder, int(match[1])
    return "", 1
