"""Finds images and captions in a folder: caption files, metadata.jsonl, and kohya's repeat folders."""

from __future__ import annotations

import json
import posixpath
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

from sushi_research import caption_text
from sushi_research.data.samples import FoundImage, Problem, Scan
from sushi_research.data.walk import walk

IMAGES = {".jpg", ".jpeg", ".png", ".webp"}
CAPTIONS = {".txt", ".caption"}
METADATA = "metadata.jsonl"
TABLES = {".parquet", ".arrow"}
# Other image formats. They are reported as problems instead of being silently ignored.
UNSUPPORTED = set(".arw .avif .bmp .cr2 .dng .gif .heic .heif .jfif .jp2 .jxl .nef .psd .svg .tga .tif .tiff".split())


def find_in_folder(
    result: Scan, root: Path, caption_column: str, outputs: Mapping[Path, str]
) -> tuple[list[FoundImage], bool]:
    """The images below a folder with their captions, and whether there are also files of an HF dataset.

    Folders that runs wrote, and those in `outputs` (path -> what it is), are skipped and noted.
    """
    images: dict[str, Path] = {}
    sidecars: dict[str, dict[str, Path]] = defaultdict(dict)
    metadata: dict[str, Path] = {}
    stems, has_tables = set(), False
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
    captions: dict[str, dict[str, str]] = defaultdict(dict)
    unreadable: dict[str, str] = {}
    not_text: dict[str, str] = {}  # the line of a metadata.jsonl, by image
    several: dict[str, int] = {}  # the number of lines of a caption, by source
    for name in images:
        for sidecar, path in sidecars.get(posixpath.splitext(name)[0], {}).items():
            try:
                caption, lines = caption_text.first_line(caption_text.decode(path.read_bytes()))
            except OSError as error:
                unreadable[name] = f"its caption cannot be read ({error.strerror or error}): {sidecar}"
            except caption_text.NotText as error:
                unreadable[name] = f"its caption {error.reason}: {sidecar}"
            else:
                captions[name][sidecar] = caption
                several[sidecar] = lines
    for name, path in metadata.items():
        for image, source, text in _metadata(result, name, path, set(images), caption_column):
            try:
                captions[image][source], several[source] = caption_text.first_line(text)
            except caption_text.NotText as error:
                result.problems.append(Problem(source, f"the caption of {image} {error.reason}"))
                not_text[image] = source
    result.notes += [
        f"{source}: a caption of {lines} lines, of which only the first is used"
        for source, lines in several.items()
        if lines > 1
    ]
    for stem in sidecars.keys() - stems:
        result.notes += [f"{name}: a caption without an image" for name in sidecars[stem]]
    found, folders = [], Counter()
    for name, path in images.items():
        repeat_folder, repeats = _repeats(name)
        folders[repeat_folder, repeats] += 1
        reason = unreadable.get(name) or _caption_problem(name, captions[name], not_text.get(name))
        if repeats == 0:
            reason = f"its folder asks for no repeats: {repeat_folder}"
        if reason is not None:
            result.problems.append(Problem(name, reason))
        caption = next(iter(captions[name].values())) if reason is None else None
        found.append(FoundImage(name, caption, repeats, path, path.read_bytes))
    result.notes += [
        f"{folder}: {count} images, each shown {repeats} times per epoch because of the number in the folder's name"
        for (folder, repeats), count in folders.items()
        if repeats > 1
    ]
    result.notes.sort()
    return found, has_tables


def _metadata(
    result: Scan, name: str, path: Path, images: set[str], caption_column: str
) -> Iterator[tuple[str, str, str]]:
    """Yields (image, source, caption) of each valid line of a metadata.jsonl. Others become problems."""

    def problem(where: str, reason: str) -> None:
        result.problems.append(Problem(where, reason))

    try:
        lines = caption_text.decode(path.read_bytes()).split("\n")
    except OSError as error:
        problem(name, f"cannot be read: {error.strerror or error}")
        return
    except caption_text.NotText as error:
        problem(name, error.reason)
        return
    first: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        source = f"{name} line {number}"
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            problem(source, f"not JSON: {error}")
            continue
        if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str):
            problem(source, "no file_name")
            continue
        image = posixpath.normpath(posixpath.join(posixpath.dirname(name), entry["file_name"]))
        caption = entry.get(caption_column, entry.get("text"))
        if image not in images:
            problem(source, f"{entry['file_name']} is not among the jpg, png and webp images here")
        elif not isinstance(caption, str):
            keys = " nor ".join(dict.fromkeys((caption_column, "text")))
            problem(source, f"no caption for {image}: {keys} is not a text")
        else:
            if first.setdefault(image, number) != number:
                problem(source, f"a second entry for {image}: the first is line {first[image]}")
            yield image, source, caption


def _caption_problem(name: str, captions: dict[str, str], not_text: str | None) -> str | None:
    """The reason why an image has no usable caption, or None if it has one.

    `captions` is by source; `not_text` is the source of another that is not text.
    """
    if not captions and not_text:
        return f"no caption but that of {not_text}, which is not text"
    if not captions:
        stem = posixpath.splitext(name)[0]
        return f"no caption: there is no {stem}.txt, {stem}.caption or entry in a {METADATA}"
    if len(set(captions.values())) > 1:
        return f"captions that differ: {' and '.join(captions)}"
    if not all(captions.values()):
        return f"its caption is empty: {' and '.join(captions)}"
    return None


def _repeats(name: str) -> tuple[str, int]:
    """(folder, repeats) of the nearest parent folder named like 10_cats, or ("", 1) without one."""
    for folder in map(str, PurePosixPath(name).parents):
        match = re.match(r"(\d{1,3})_.", posixpath.basename(folder))
        if match:
            return folder, int(match[1])
    return "", 1
