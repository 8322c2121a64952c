"""Lists the files of a data folder: follows links, and skips hidden files and what this program wrote."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from sushi_research.data.own_outputs import kind_of, own_pictures
from sushi_research.data.scan import Problem, Scan


def walk(result: Scan, root: Path, outputs: Mapping[Path, str]) -> Iterator[tuple[str, str]]:
    """Yields (name, path) of every file that is not hidden; the name is relative, with /. Follows links, each folder once.

    Folders that this program wrote, and those in `outputs` (path -> what it is), are skipped unless they are the root itself.
    """
    own = {os.path.realpath(path): what for path, what in outputs.items()}
    seen: dict[tuple[int, int], str] = {}
    elsewhere = _Elsewhere(root)
    skipped: list[str] = []
    waiting = [str(root)]
    while waiting:
        folder = waiting.pop()
        name = name_of(folder, root)
        try:
            status = os.stat(folder)
            first = seen.setdefault((status.st_dev, status.st_ino), name)
            if first != name:
                result.notes.append(f"{name}: the same folder as {first}, read once")
                continue
            folders, files, links = _entries(folder)
        except OSError as error:
            result.problems.append(Problem(name, f"cannot be read: {error.strerror}"))
            continue
        real = os.path.realpath(folder)
        kind = own.get(real) or kind_of(Path(folder), folders + files)
        if kind is not None and folder != str(root):
            skipped.append(f"{name}: {kind}, skipped")
            continue
        pictures = own_pictures(Path(folder), folders, files)
        prefix = "" if folder == str(root) else f"{name}/"
        skipped += [f"{prefix}{_shown(file)}: a picture of this program, skipped" for file in sorted(pictures)]
        visible = [entry for entry in folders if not entry.startswith(".")]
        waiting += [os.path.join(folder, entry) for entry in sorted(visible, reverse=True)]
        result.ignored += len(folders) - len(visible)
        elsewhere.enter(real)
        inside = os.path.join(folder, "")
        for file in sorted(files):
            if file.startswith("."):
                result.ignored += 1
            elif file not in pictures:
                path = inside + file
                elsewhere.see(path, file in links)
                yield prefix + _shown(file), path
    result.skipped += skipped
    result.notes += skipped
    result.notes += elsewhere.notes()


def _entries(folder: str) -> tuple[list[str], list[str], set[str]]:
    """The names of folders, of files, and of those files that are links. Raises OSError, also in the middle of the list."""
    folders, files, links = [], [], set()
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                is_folder = entry.is_dir()
            except OSError:
                is_folder = False  # its reader will say what is wrong with it
            if is_folder:
                folders.append(entry.name)
                continue
            files.append(entry.name)
            if entry.is_symlink():
                links.add(entry.name)
    return folders, files, links


def name_of(path: str | Path, root: Path) -> str:
    """The path below the root. Bytes that are not UTF-8 are written as \\udcXX, which every terminal and file can represent."""
    return _shown(Path(path).relative_to(root).as_posix())


def _shown(name: str) -> str:
    return name if name.isascii() else name.encode("utf-8", "backslashreplace").decode()


def note_links(result: Scan, root: Path, files: Iterable[Path]) -> None:
    """Notes the files that are outside of the root and read through links, of those files of a data set."""
    elsewhere = _Elsewhere(root)
    for path in files:
        elsewhere.enter(os.path.realpath(path.parent))
        elsewhere.see(str(path), path.is_symlink())
    result.notes += elsewhere.notes()


class _Elsewhere:
    """Counts the files that are outside of the root and read through links.

    Links are followed, because people link the folders of their images. A dataset that was downloaded may hold links too, so the
    note says what is read from elsewhere.
    """

    def __init__(self, root: Path) -> None:
        self._root, self._real = root, Path(os.path.realpath(root))
        self._folder, self._inside = "", True
        self._first: tuple[str, str] | None = None
        self._count = 0

    def enter(self, real: str) -> None:
        """The files that follow are in the folder whose real path this is."""
        self._folder, self._inside = real, Path(real).is_relative_to(self._real)

    def see(self, path: str, is_link: bool) -> None:
        """Counts a file of the folder, if it is outside of the root."""
        if not is_link and self._inside:
            return
        target = os.path.realpath(path) if is_link else os.path.join(self._folder, os.path.basename(path))
        if not is_link or not Path(target).is_relative_to(self._real):
            self._count += 1
            self._first = self._first or (path, target)

    def notes(self) -> list[str]:
        """A note with their number and the first of them; none if there are none."""
        if self._first is None:
            return []
        path, target = self._first
        return [
            f"{self._count} file{'s' if self._count > 1 else ''} outside of this folder, read through links: "
            f"{name_of(path, self._root)} is {target.encode('utf-8', 'backslashreplace').decode()}"
        ]
