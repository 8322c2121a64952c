"""The lock of a run folder. The folder itself is locked, not a file in it: a file can be removed while the lock is held.

A folder can also be moved, deleted or replaced while a run is using it. So the process keeps it open, and every write first checks
that the path still leads to it (`files.require_same_folder`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from sushi_research.errors import UserError
from sushi_research.files import disk_error, guard, unguard

logger = logging.getLogger(__name__)

# A note in the folder: who holds it. On file systems that cannot lock a folder (NFS), this file is locked instead.
NOTE = ".lock"
# Seconds between attempts: compare_runs.py holds the lock for an instant to see whether a run is going on.
_WAITS = (0.05, 0.2)


class FolderLock:
    """A folder that this process has open and has locked, as far as the file system can. `close` releases it."""

    def __init__(self, path: Path) -> None:
        """Creates the folder if it is missing and locks it.

        Raises UserError if another process holds it, or if it cannot be made. Windows has no such lock; on a file system without
        locks a warning is logged.
        """
        self.path = path
        self._folder: int | None = None
        self._note: int | None = None
        try:
            while True:
                path.mkdir(parents=True, exist_ok=True)
                self._opened = os.stat(path)
                # Windows cannot open a folder.
                self._folder = None if os.name == "nt" else os.open(path, os.O_RDONLY)
                self._lock()
                if self._is_same():
                    break
                self.close()  # it was deleted before it was locked
        except OSError as error:
            self.close()
            raise disk_error(f"cannot make the run folder {path}", error) from error
        except UserError:
            self.close()
            raise
        guard(path, self.require_same)

    def require_same(self) -> None:
        """UserError if the path no longer leads to the folder that was locked."""
        try:
            same = self._is_same()
        except OSError as error:
            raise disk_error(f"cannot reach the run folder {self.path}", error) from error
        if not same:
            raise UserError(
                f"the run folder {self.path} was moved, deleted or replaced while this run was using it, so the run stops and "
                "writes nothing more: move it back, or run the same command again for the run that is there now."
            )

    def close(self) -> None:
        """Releases the lock. It is also released when the process ends, for whatever reason."""
        unguard(self.path, self.require_same)
        for descriptor in (self._note, self._folder):
            if descriptor is not None:
                with contextlib.suppress(OSError):  # it is closed all the same
                    os.close(descriptor)
        self._note = self._folder = None

    def _is_same(self) -> bool:
        opened = self._opened if self._folder is None else os.fstat(self._folder)
        try:
            return os.path.samestat(os.stat(self.path), opened)
        except (FileNotFoundError, NotADirectoryError):
            return False

    def _lock(self) -> None:
        locked = None if self._folder is None else try_lock(self._folder)
        if locked is not False:
            self._note = os.open(self.path / NOTE, os.O_RDWR | os.O_CREAT, 0o666)
        if locked is None and fcntl is not None:
            locked = try_lock(self._note)
            if locked is None:
                logger.warning("%s cannot be locked: do not launch this run twice", self.path)
        if locked is False:
            raise UserError(
                f"the run {self.path} is in use by {_holder(self.path)}: wait for it or stop it, or give another --run.name"
            )
        try:
            self._write_note()
        except OSError as error:  # nothing depends on the note
            logger.warning("cannot write %s: %s", self.path / NOTE, error.strerror or error)

    def note_stop(self) -> None:
        """Notes in the folder that this process was asked to stop, for whoever runs the command again before it has.

        A signal handler calls it, so it never fails.
        """
        if self._note is not None:
            with contextlib.suppress(OSError):
                self._write_note(", which was asked to stop and is finishing its last step")

    def _write_note(self, state: str = "") -> None:
        os.ftruncate(self._note, 0)
        os.lseek(self._note, 0, os.SEEK_SET)
        os.write(self._note, f"process {os.getpid()} on {socket.gethostname()}{state}".encode())


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock of the folder `path`. Does not keep the lock itself."""
    if fcntl is None:
        return False
    for part in (path, path / NOTE):
        try:
            descriptor = os.open(part, os.O_RDONLY)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            continue
        finally:
            os.close(descriptor)
    return False


def try_lock(descriptor: int) -> bool | None:
    """Whether the lock was taken; None if the file system has no such locks."""
    for wait in (*_WAITS, None):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if wait is None:
                return False
            time.sleep(wait)
        except OSError:
            return None
        else:
            return True
    raise AssertionError


def unlock(descriptor: int) -> None:
    """Releases a lock that `try_lock` took, also for processes that have inherited the descriptor."""
    if fcntl is not None:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)


def _holder(path: Path) -> str:
    """Who holds the lock, by the note; it may have been removed."""
    try:
        return (path / NOTE).read_text(encoding="utf-8") or "another process"
    except OSError:
        return "another process"
