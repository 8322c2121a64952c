"""Lists the files of a data folder: follows links, and skips hidden files and what this program wrote."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from sushi_research.data.own_outputs import kind_of, own_pictures
from sushi_research.data.samples import Problem, Scan


def walk(result: Scan, root: Path, outputs: Mapping[Path, str]) -> Iterator[tuple[str, Path]]:
    """Yields (name, path) of every file that is not hidden; the name is relative, with /. Follows links, each folder once.

    Folders that this program wrote, and those in `outputs` (path -> what it is), are skipped unless they are the root itself.
    """

    def note_unreadable(error: OSError) -> None:
        result.problems.append(Problem(name_of(error.filename, root), f"cannot be read: {error.strerror}"))

    own = {os.path.realpath(path): what for path, what in outputs.items()}
    seen: dict[tuple[int, int], str] = {}
    found = []
    for folder, folders, files in os.walk(root, onerror=note_unreadable, followlinks=True):
        status = os.stat(folder)
        name = name_of(folder, root)
        first = seen.setdefault((status.st_dev, status.st_ino), name)
        if first != name:
            result.notes.append(f"{name}: the same folder as {first}, read once")
            folders.clear()
            continue
        kind = own.get(os.path.realpath(folder)) or kind_of(Path(folder), folders + files)
        if kind is not None and Path(folder) != root:
            result.skipped.append(f"{name}: {kind}, skipped")
            folders.clear()
            continue
        pictures = own_pictures(Path(folder), folders, files)
        result.skipped += [
            f"{name_of(Path(folder, file), root)}: a picture of this program, skipped" for file in sorted(pictures)
        ]
        result.ignored += sum(entry.startswith(".") for entry in folders + files)
        folders[:] = sorted(entry for entry in folders if not entry.startswith("."))
        for file in sorted(entry for entry in files if not entry.startswith(".") and entry not in pictures):
            path = Path(folder, file)
            found.append(path)
            yield name_of(path, root), path
    result.notes += result.skipped
    note_links(result, root, found)


def name_of(path: str | Path, root: Path) -> str:
    """The path below the root. Bytes that are not UTF-8 are written as \\udcXX, which every terminal and file can represent."""
    name = Path(path).relative_to(root).as_posix()
    return name.encode("utf-8", "backslashreplace").decode()


def note_links(result: Scan, root: Path, files: Iterable[Path]) -> None:
    """Notes the files that are outside of the root and read through links.

    Links are followed, because people link the folders of their images. A dataset that was downloaded may hold links too, so the
    note says what is read from elsewhere.
    """
    real_root = os.path.realpath(root)
    real: dict[Path, str] = {}  # of folders: one look-up each
    outside = []
    for path in files:
        folder = real.setdefault(path.parent, os.path.realpath(path.parent))
        target = os.path.realpath(path) if path.is_symlink() else os.path.join(folder, path.name)
        if not Path(target).is_relative_to(real_root):
            outside.append((path, target))
    if outside:
        (path, target), count = outside[0], len(outside)
        example = f"{name_of(path, root)} is {target.encode('utf-8', 'backslashreplace').decode()}"
        result.notes.append(
            f"{count} file{'s' if count > 1 else ''} outside of this folder, read through links: {example}"
        )
