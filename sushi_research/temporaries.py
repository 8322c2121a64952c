"""Temporary files: a new file is written next to its final place, under `.<name>.<8 hex digits>.tmp`, and renamed when it is whole.

A killed process leaves its temporary file behind. The writer locks the file while it is open, and the kernel releases that lock
when the process ends, for whatever reason. So whoever gets the lock knows that nobody is writing the file, and may remove it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.getLogger(__name__)

_NAME = re.compile(r"\.(.+)\.[0-9a-f]{8}\.tmp", re.DOTALL)
# Without locks (Windows, some network file systems) only the age tells. No writer takes this long over one file.
_OLD_SECONDS = 6 * 3600


def hidden_name(path: Path) -> Path:
    """A new hidden name next to `path`, on the same file system: `.<name>.<8 random hex digits>.tmp`."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


@contextlib.contextmanager
def temporary_file(path: Path) -> Iterator[tuple[BinaryIO, Path]]:
    """A new file that the block renames to `path`: (file, its path). It is locked while it is open, and removed if the block ends
    with an exception. Also removes what killed writers of `path` left. Raises OSError."""
    remove_abandoned(path.parent, path.name)
    file, temporary = _create(path)
    try:
        with file:
            yield file, temporary
    except BaseException:
        with contextlib.suppress(OSError):  # it was renamed already, or the folder is gone
            os.unlink(temporary)
        raise


def remove_leftovers(folder: Path) -> None:
    """Removes all temporary files in `folder`, whose lock this process holds, so that no other process writes in it.

    Folders and other names stay. A file that cannot be removed is reported in a warning.
    """
    for leftover in _named(folder):
        _remove(leftover, os.unlink)


def remove_abandoned(folder: Path, name: str | None = None) -> None:
    """Removes the temporary files in `folder`, of the file `name` or of all, that killed processes left. Other processes may write
    there meanwhile."""
    for leftover in _named(folder, name):
        _remove(leftover, _remove_if_abandoned)


def _named(folder: Path, name: str | None = None) -> list[Path]:
    """The temporary files in `folder`, of the file `name` or of all."""
    try:
        found = os.listdir(folder)
    except OSError:
        return []  # there is no such folder, or it cannot be used, which its next use reports
    matches = (_NAME.fullmatch(each) for each in found)
    return [folder / match[0] for match in matches if match and name in (None, match[1])]


def _remove(path: Path, unlink: Callable[[Path], None]) -> None:
    try:
        if stat.S_ISREG(os.lstat(path).st_mode):
            unlink(path)
    except FileNotFoundError:
        pass  # its writer renamed it, or another process removed it
    except OSError as error:
        logger.warning("cannot remove %s, which a killed process left: %s", path, error.strerror or error)


def _create(path: Path) -> tuple[BinaryIO, Path]:
    while True:
        temporary = hidden_name(path)
        file = open(temporary, "xb")
        if fcntl is None:
            return file, temporary
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        # Between its creation and its lock, another process may have taken it for a leftover.
        if os.path.lexists(temporary):
            return file, temporary
        file.close()


def _remove_if_abandoned(path: Path) -> None:
    """Removes the file if no process has locked it; on a file system without locks, if it is old."""
    if fcntl is None:
        if _is_old(path):
            os.unlink(path)
        return
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    except PermissionError:
        return  # another user's, who may be writing it
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        except OSError:
            if not _is_old(path):
                return
        os.unlink(path)  # before the lock is released
    finally:
        os.close(descriptor)


def _is_old(path: Path) -> bool:
    return time.time() - os.stat(path).st_mtime > _OLD_SECONDS
