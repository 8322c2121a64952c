"""Finds images and captions in a folder: caption files, metadata.jsonl, and kohya's repeat folders."""

from __future__ import annotations

import posixpath
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path, PurePosixPath

from sushi_research import caption_text
from sushi_research.data import metadata_file
from sushi_research.data.images import MAX_BYTES
from sushi_research.data.metadata_file import FORMS, METADATA, UNREAD, Entry, Miss, Unusable
from sushi_research.data.names import CAPTIONS, IMAGES, UNSUPPORTED, Names, composed
from sushi_research.data.samples import FoundImage, Problem, Scan
from sushi_research.data.walk import walk
from sushi_research.errors import some
from sushi_research.user_files import UnreadableFile, read_regular

TABLES = {".parquet", ".arrow"}


def find_in_folder(
    result: Scan, root: Path, caption_column: str, outputs: Mapping[Path, str]
) -> tuple[list[FoundImage], bool]:
    """The images below a folder with their captions, and whether there are also files of an HF dataset.

    Folders that runs wrote, and those in `outputs` (path -> what it is), are skipped and noted.
    """
    images: dict[str, Path] = {}
    sidecars: dict[str, dict[str, Path]] = defaultdict(dict)
    metadata: dict[str, Path] = {}
    stems, unread, has_tables = set(), [], False
    for name, path in walk(result, root, outputs):
        stem, suffix = posixpath.splitext(name)
        suffix = suffix.lower()
        if suffix in IMAGES | UNSUPPORTED:
            stems.add(stem)
        if suffix in IMAGES:
            images[name] = path
        elif suffix in UNSUPPORTED:
            result.problems.append(Problem(name, f"{suffix} is not supported: convert it to png"))
        elif suffix in CAPTIONS:
            sidecars[stem][name] = path
        elif path.name == METADATA:
            metadata[name] = path
        else:
            result.ignored += 1
            has_tables = has_tables or suffix in TABLES
            unread += [name] if path.name.lower() in UNREAD else []
    captions = _Captions(images)
    stray = captions.read_files(result, sidecars, Names(stems))
    captions.read_metadata(result, metadata, caption_column)
    result.notes += captions.notes()
    unread_hint = f" ({unread[0]} is not read: write a {METADATA})" if unread else ""
    found = []
    for name, path in images.items():
        repeat_folder, repeats = repeats_of(name)
        reason = captions.problem(name)
        if not captions.of[name] and reason is None:
            stem, near = posixpath.splitext(name)[0], stray.near(name, posixpath.dirname(name))
            reason = f"no caption: there is no {stem}.txt, {stem}.caption or entry in a {METADATA}"
            reason += f" (there is {near[0]})" if near else unread_hint
        if repeats == 0:
            reason = f"its folder asks for no repeats: {repeat_folder}"
        if reason is not None:
            result.problems.append(Problem(name, reason))
        caption = next(iter(captions.of[name].values())) if reason is None else None
        found.append(FoundImage(name, caption, repeats, path, partial(read_regular, path, MAX_BYTES)))
    result.notes.sort()
    return found, has_tables


class _Captions:
    """The captions of images: `of` an image, by source, and the reasons why an image has none that can be used."""

    def __init__(self, images: Iterable[str]) -> None:
        self.of: dict[str, dict[str, str]] = {name: {} for name in images}
        self._unreadable: dict[str, str] = {}
        self._reasons: dict[str, str] = {}  # for images without any caption
        self._lines: dict[str, int] = {}  # of the captions, by source
        self._names = Names(self.of)

    def read_files(self, result: Scan, files: Mapping[str, dict[str, Path]], stems: Names) -> Names:
        """Reads caption files, given by their stems, for the images of these stems. Returns those that have no image."""
        own: dict[str, dict[str, Path]] = defaultdict(dict)
        stray = []
        for stem, paths in files.items():
            fitting = stems.matching(stem)
            if len(fitting) == 1:
                own[fitting[0]] |= paths
                continue
            stray += paths
            what = f"{len(fitting)} images whose names {FORMS}" if fitting else ""
            result.notes += [f"{name}: a caption {f'of {what}' if what else 'without an image'}" for name in paths]
            reason = f"no caption: {some(list(paths))} fits {what}: rename one of them"
            self._reasons |= {name: reason for name in self.of if posixpath.splitext(name)[0] in fitting}
        for name in self.of:
            for source, path in own.get(posixpath.splitext(name)[0], {}).items():
                try:
                    caption, lines = caption_text.first_line(
                        caption_text.decode(read_regular(path, caption_text.MOST_BYTES))
                    )
                except UnreadableFile as error:
                    self._unreadable[name] = f"its caption {error.reason}: {source}"
                except caption_text.NotText as error:
                    self._unreadable[name] = f"its caption {error.reason}: {source}"
                else:
                    self.of[name][source], self._lines[source] = caption, lines
        return Names(stray)

    def read_metadata(self, result: Scan, files: Mapping[str, Path], caption_column: str) -> None:
        """Reads metadata files. What cannot be used is added to the problems."""
        misses = []
        for file, path in files.items():
            for line in metadata_file.read(file, path, self._names, caption_column):
                if isinstance(line, Entry):
                    self.of[line.image][line.source], self._lines[line.source] = line.caption, line.lines
                elif isinstance(line, Miss):
                    misses.append(line)
                elif isinstance(line, Unusable):
                    result.problems.append(Problem(line.source, line.reason))
                    self._reasons = dict.fromkeys(line.images, line.of_image) | self._reasons
                else:
                    result.problems.append(line)
        without = {name for name, captions in self.of.items() if not captions and self.problem(name) is None}
        problems, reasons = metadata_file.explain(misses, self._names, without)
        result.problems += problems
        self._reasons |= reasons

    def problem(self, image: str) -> str | None:
        """The reason why the captions of an image cannot be used; None if they can, or if nothing is known of any."""
        captions = self.of[image]
        if image in self._unreadable or not captions:
            return self._unreadable.get(image) or self._reasons.get(image)
        if len(set(captions.values())) > 1:
            forms = f", names that {FORMS}" if len(set(map(composed, captions))) < len(captions) else ""
            return f"captions that differ: {' and '.join(captions)}{forms}"
        if not all(captions.values()):
            return f"its caption is empty: {' and '.join(captions)}"
        return None

    def notes(self) -> list[str]:
        """A note on each caption of several lines."""
        return [
            f"{source}: a caption of {lines} lines, of which only the first is used"
            for source, lines in self._lines.items()
            if lines > 1
        ]


def repeats_of(name: str) -> tuple[str, int]:
    """(folder, repeats) of the nearest parent folder named like 10_cats, or ("", 1) without one."""
    for folder in map(str, PurePosixPath(name).parents):
        match = re.match(r"(\d{1,3})_.", posixpath.basename(folder))
        if match:
            return folder, int(match[1])
    return "", 1
