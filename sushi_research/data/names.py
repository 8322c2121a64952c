"""Finds a file by a name that was written elsewhere: in any Unicode form, or else the file that was most likely meant.

A Mac may decompose the letters of a name (NFD) where other programs compose them (NFC). Both look alike, and both are meant as the
same name. Two files may still differ in nothing but their form.
"""

from __future__ import annotations

import os
import posixpath
import unicodedata
import urllib.parse
from collections import defaultdict
from collections.abc import Collection, Iterable
from functools import cached_property, lru_cache
from pathlib import Path

IMAGES = set(".jpg .jpeg .jfif .png .apng .webp .avif .heic .heif .bmp .gif .tif .tiff".split())
# Other image formats. They are reported as problems instead of being silently ignored.
UNSUPPORTED = set(".arw .cr2 .dng .jp2 .jxl .nef .psd .svg .tga".split())
CAPTIONS = {".txt", ".caption"}
# Files that hold others and are not read. A .tar in WebDataset's form is a table (folder_files.TABLES).
ARCHIVES = set(".zip .tgz .gz .bz2 .xz .zst .7z .rar".split())
# How many files of one loosely spelt name are compared: there may be thousands of 0.png.
_MOST = 100


def composed(name: str) -> str:
    """The name in NFC: equal for names that differ only in their Unicode form."""
    return unicodedata.normalize("NFC", name)


class Names:
    """Names of files, as paths with /, which are found in any Unicode form."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = set(names)

    def matching(self, name: str) -> list[str]:
        """The file of exactly this name, or else the files whose names differ from it only in their Unicode form."""
        return [name] if name in self._names else list(self._forms.get(composed(name), []))

    def near(self, written: str, folder: str) -> list[str]:
        """The files that `written` may mean although it is none of their names; several if they are equally likely.

        Folders in front of the name, its suffix, case, backslashes, spaces at the ends, percent-encoding and wide letters may
        differ. Files below `folder`, and those with the same suffix, come first.
        """
        parts = _loose_parts(written)[-self._deepest :]
        tails = [tuple(parts[start:]) for start in range(len(parts))]
        found = next((self._tails[tail] for tail in tails if tail in self._tails), [])
        suffix = posixpath.splitext(written.strip())[1]
        for likely in (lambda name: name.startswith(f"{folder}/"), lambda name: name.endswith(suffix)):
            found = [name for name in found if likely(name)] or found
        return found

    @cached_property
    def _forms(self) -> dict[str, list[str]]:
        """The names by their composed form. Most are found as they are, and it is not needed."""
        forms: dict[str, list[str]] = defaultdict(list)
        for name in sorted(self._names):
            forms[composed(name)].append(name)
        return forms

    @cached_property
    def _deepest(self) -> int:
        """How many parts the names have at most. A line may name a file below 100,000 folders."""
        return max(map(len, self._tails), default=1)

    @cached_property
    def _tails(self) -> dict[tuple[str, ...], list[str]]:
        """The files by the last parts of their names, loosely spelt: by the last one, the last two and so on."""
        tails: dict[tuple[str, ...], list[str]] = defaultdict(list)
        for name in sorted(self._names):
            parts = _loose_parts(name)
            for start in range(len(parts)):
                found = tails[tuple(parts[start:])]
                if len(found) < _MOST:
                    found.append(name)
        return tails


def _loose_parts(name: str) -> list[str]:
    """The parts of a path in which different spellings of a name agree; the last is without the suffixes of images and captions."""
    plain = unicodedata.normalize("NFKC", urllib.parse.unquote(name)).casefold().replace("\\", "/")
    parts = [part for part in map(str.strip, plain.split("/")) if part not in ("", ".", "..")]
    while parts:
        stem, suffix = posixpath.splitext(parts[-1])
        if suffix not in IMAGES | UNSUPPORTED | CAPTIONS:
            break
        parts[-1] = stem.strip()
    return parts


def in_any_form(folder: Path, name: str) -> Path:
    """The path of `name` below a folder, which may be on the disk in another Unicode form; `folder / name` if there is none.

    Only parts of the name that are missing as they are written are looked for, and only where one file fits.
    """
    path = folder / name
    if name.isascii() or os.path.lexists(path):
        return path
    found = folder
    for part in Path(name).parts:
        if not os.path.lexists(found / part) and part not in (os.sep, ".."):
            fitting = _entries(found).get(composed(part), ())
            part = fitting[0] if len(fitting) == 1 else part
        found /= part
    return found


def _entries(folder: Path) -> dict[str, Collection[str]]:
    try:
        return _entries_at(folder, os.stat(folder).st_mtime_ns)
    except OSError:
        return {}


@lru_cache(maxsize=16)
def _entries_at(folder: Path, mtime_ns: int) -> dict[str, Collection[str]]:
    """The names in a folder by their composed form; listed once for all rows that name files in it."""
    entries = defaultdict(list)
    for entry in os.listdir(folder):
        entries[composed(entry)].append(entry)
    return entries
