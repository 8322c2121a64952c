"""Reads the captions of a metadata.jsonl: one image a line, by its file_name, which counts from the folder of the file."""

from __future__ import annotations

import difflib
import io
import itertools
import json
import posixpath
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sushi_research import caption_text
from sushi_research.data.names import Names
from sushi_research.data.scan import Problem
from sushi_research.errors import UserError
from sushi_research.user_files import UnreadableFile, open_regular, parse_json

METADATA = "metadata.jsonl"
# Names of HF's imagefolder and misspelt ones; they are not read, which is said where captions are missing.
UNREAD = {"metadata.csv", "metadata.parquet", "metadata.json", METADATA}
# A similar name is looked for that many times, among that many images: it takes up to a tenth of a second.
_SEARCHED, _AMONG = 10, 200
_SHOWN = 200  # letters of a name
# Letters of a line: some captions, each of several thousand, and other columns.
_MOST_LETTERS = 2**20
# Another kind of file may have millions of lines, each of which would be a problem.
_MOST_BAD = 100
FORMS = "differ only in their Unicode form"


@dataclass(frozen=True)
class Entry:
    """The captions of an image, and their place in the file."""

    image: str
    source: str
    captions: tuple[str, ...]


@dataclass(frozen=True)
class Value:
    """What a line has in another column than that of the captions."""

    image: str
    value: Any


@dataclass(frozen=True)
class Unusable:
    """A line that names images and gives none of them a caption; `of_image` is the reason why such an image has none."""

    images: list[str]
    source: str
    reason: str
    of_image: str


@dataclass(frozen=True)
class Miss:
    """A line whose file_name is no image, as it is `written`; `folder` is that of the metadata file."""

    source: str
    written: str
    folder: str


def read(
    name: str, path: Path, images: Names, column: str, *, also: str | None = None, values: bool = False
) -> Iterator[Entry | Value | Unusable | Miss | Problem]:
    """Each line of the metadata file `name` that is not blank, as what it is. Stops where nothing but unusable lines is found.

    `column` has the captions; a line without one that has the column `also` is left out. With `values` it has other values, and an
    image's line is a `Value`.
    """
    first: dict[str, int] = {}
    good, bad = 0, 0
    try:
        for number, line in _lines(path):
            source = f"{name} line {number}"
            if len(line) > _MOST_LETTERS:
                written, entry = f"is longer than {_MOST_LETTERS:,} letters: remove it", None
            else:
                written, entry = _parse(line)
            if entry is None:
                bad += 1
                if bad == _MOST_BAD and not good:
                    yield Problem(name, f"none of the first {bad:,} lines is an entry, and the others are not read")
                    return
                yield Problem(source, written)
                continue
            good += 1
            folder = posixpath.dirname(name)
            found = images.matching(posixpath.normpath(posixpath.join(folder, written)))
            if not found:
                yield Miss(source, written, folder)
            elif len(found) > 1:
                reason = f"{shown(written)} fits {len(found)} images whose names {FORMS}: rename one of them"
                yield Unusable(found, source, reason, f"no caption: {source} fits another image too")
            else:
                if first.setdefault(found[0], number) != number:
                    yield Problem(source, f"a second entry for {found[0]}: the first is line {first[found[0]]}")
                if values:
                    yield Value(found[0], entry.get(column))
                elif also not in entry or column in entry or "text" in entry:
                    yield _entry(found[0], source, entry, column)
    except UnreadableFile as error:
        yield Problem(name, error.reason)
    except UnicodeDecodeError:
        yield Problem(name, caption_text.UNDECODABLE)
    except OSError as error:
        yield Problem(name, f"cannot be read ({error.strerror or error})")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, text) of each line that is not blank, one in memory at a time; of one that is too long, its beginning."""
    with open_regular(path) as file:
        start = file.read(4)
        file.seek(0)
        text = io.TextIOWrapper(file, caption_text.encoding_of(start), newline="\n")
        for number in itertools.count(1):
            line = rest = text.readline(_MOST_LETTERS + 1)
            while len(rest) > _MOST_LETTERS and not rest.endswith("\n"):
                rest = text.readline(_MOST_LETTERS + 1)
            if not line:
                return
            if not line.isspace():
                yield number, line.rstrip("\r\n")


def _parse(line: str) -> tuple[str, dict[str, Any] | None]:
    """(file_name, entry) of a line; (reason, None) if it is no entry."""
    try:
        entry = parse_json(line, "it")
    except UserError as error:
        return str(error).removeprefix("it "), None
    written = entry.get("file_name") if isinstance(entry, dict) else None
    if not isinstance(written, str) or not written.strip():
        return "no file_name", None
    return written.encode(
        "utf-8", "backslashreplace"
    ).decode(), entry  # as `walk.name_of` writes bytes that are not UTF-8


def _entry(image: str, source: str, entry: dict[str, Any], caption_column: str) -> Entry | Unusable:
    caption, fault = entry.get(caption_column, entry.get("text")), "not text"
    texts = caption if isinstance(caption, list) else [caption]
    if all(isinstance(text, str) for text in texts):
        try:
            return Entry(image, source, tuple(line for text in texts for line in caption_text.lines(text)))
        except caption_text.NotText as error:
            reason = f"the caption of {image} {error.reason}"
            fault = "too long" if any(len(text) > caption_text.MOST_LETTERS for text in texts) else fault
    else:
        keys = " nor ".join(dict.fromkeys((caption_column, "text")))
        reason = f"no caption for {image}: {keys} is not a text"
    return Unusable([image], source, reason, f"no caption but that of {source}, which is {fault}")


def explain(
    misses: Sequence[Miss], images: Names, uncaptioned: Collection[str]
) -> tuple[list[Problem], dict[str, str]]:
    """The problems of lines that name no image, and the reasons why images of `uncaptioned` have no caption, by image.

    A line that clearly means an image without a caption is one problem: that of the image.
    """
    problems, reasons = [], {}
    for number, miss in enumerate(misses):
        near = images.near(miss.written, miss.folder)
        if not near and number < _SEARCHED and len(uncaptioned) <= _AMONG:
            near = difflib.get_close_matches(
                posixpath.join(miss.folder, miss.written)[:_SHOWN], uncaptioned, n=1, cutoff=0.8
            )
        meant = [posixpath.relpath(name, miss.folder or ".") for name in near]
        written, rule = shown(miss.written), f"file_name counts from the folder of its {METADATA}"
        if len(near) == 1 and near[0] in uncaptioned and near[0] not in reasons:
            reasons[near[0]] = f"no caption: {miss.source} has {written}, and {rule}: write {shown(meant[0])}"
        else:
            hint = f" (did you mean {' or '.join(map(shown, meant[:2]))}?)" if meant else ""
            problems.append(Problem(miss.source, f"{written} is not among the images here; {rule}{hint}"))
    return problems, reasons


def shown(name: str) -> str:
    """A name for a message: short, and in quotes if it begins or ends with a space."""
    name = name if len(name) <= _SHOWN else f"{name[:_SHOWN]}..."
    return name if name == name.strip() else json.dumps(name, ensure_ascii=False)
