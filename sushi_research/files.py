"""Writes files atomically: a temporary file next to the target, synced, then renamed.

A failed write is a `CannotWrite`, which names the path and the reason. Reading is in user_files.py.

A process may guard a folder, such as its run folder: every write below it then first checks that it is still the same folder.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from sushi_research.errors import UserError
from sushi_research.temporaries import temporary_file

if TYPE_CHECKING:
    from PIL import Image

# The checks of the folders that this process guards.
_guards: dict[Path, Callable[[], None]] = {}


def guard(folder: Path, check: Callable[[], None]) -> None:
    """From now on, `check` is called before every write below `folder`. It raises UserError if the folder is another one now."""
    _guards[folder.absolute()] = check


def unguard(folder: Path, check: Callable[[], None]) -> None:
    """Ends a guard that `check` was given for."""
    if _guards.get(folder.absolute()) == check:
        del _guards[folder.absolute()]


def require_same_folder(path: Path) -> None:
    """UserError if `path` is in a guarded folder that is another one now.

    Call it before a write, a removal or a new folder that this module does not make.
    """
    path = path.absolute()
    for folder, check in list(_guards.items()):
        if path.is_relative_to(folder):
            check()


class CannotWrite(UserError):
    """A write that failed. `reason` is the message without the advice: what failed, and why."""

    def __init__(self, reason: str, advice: str) -> None:
        super().__init__(f"{reason}; {advice}")
        self.reason = reason


def reason_of(error: UserError) -> str:
    """The message of an error for a sentence that goes on: of CannotWrite without the advice."""
    return error.reason if isinstance(error, CannotWrite) else str(error).removesuffix(".")


def disk_error(what: str, error: OSError) -> CannotWrite:
    """The error for a failed write: `what` failed, the reason, and what to do."""
    advice = _ADVICE.get(error.errno, "check the path and the disk")
    return CannotWrite(
        f"{what}: {error.strerror or error}",
        f"{advice}, then run the same command again: what was written before is intact",
    )


_ADVICE = dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space")
_ADVICE |= dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "make the folder writable")
_ADVICE |= {
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f, or that of the file system)",
    errno.EIO: "check the disk",
}
_ADVICE |= dict.fromkeys((errno.EMFILE, errno.ENFILE), "raise the limit on open files (ulimit -n)")


@contextlib.contextmanager
def writing(what: str, path: Path) -> Iterator[None]:
    """A block that changes `path`: the check of `require_same_folder` before it, and CannotWrite ("cannot <what> <path>") for an
    OSError in it."""
    require_same_folder(path)
    try:
        yield
    except OSError as error:
        require_same_folder(path)  # if the folder is gone, that is the reason
        raise disk_error(f"cannot {what} {path}", error) from error


@contextlib.contextmanager
def system_errors() -> Iterator[None]:
    """Context manager or decorator around a whole command: any other OSError about a file becomes a UserError.

    Errors without a file name are not about files: those of a closed stdout, or of the network.
    """
    try:
        yield
    except OSError as error:
        if not isinstance(error.filename, str | bytes | os.PathLike):
            raise
        raise disk_error(f"cannot use {os.fsdecode(error.filename)}", error) from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yields a new file that replaces the one at `path` at the end of the block. If the process is killed, or the block ends with
    an exception, the old file stays.

    The folder must exist. Raises CannotWrite, and leaves no temporary file, if the disk is full or the folder is not writable.
    """
    with writing("write", path):
        with temporary_file(path) as (file, temporary):
            yield file
            fsync_file(file)
            require_same_folder(path)
            if os.name == "nt":
                file.close()  # an open file cannot be renamed there
            os.replace(temporary, path)
        fsync_folder(path.parent)


def write_atomic(path: Path, data: bytes) -> None:
    """Replace the file at `path` with `data`, as `replacing` does. Raises CannotWrite."""
    with replacing(path) as file:
        file.write(data)


def append(path: Path, data: bytes) -> None:
    """Adds `data` to the end of a file, which is created if it is missing. Raises CannotWrite if that fails."""
    with writing("write", path), open(path, "ab") as file:
        file.write(data)


def sync(path: Path) -> None:
    """Waits until everything that was appended to the file at `path` is on the disk; nothing if there is no file. CannotWrite if
    that fails."""
    with writing("write", path), contextlib.suppress(FileNotFoundError), open(path, "r+b") as file:
        os.fsync(file.fileno())


def make_folder(path: Path) -> None:
    """Creates a folder and those above it, if they are missing. Raises CannotWrite if that fails."""
    with writing("make the folder", path):
        path.mkdir(parents=True, exist_ok=True)


def remove(path: Path) -> None:
    """Removes a file, or a folder with all that is in it, if it is there. Raises CannotWrite if that fails."""
    with writing("remove", path), contextlib.suppress(FileNotFoundError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def write_image(path: Path, image: Image.Image, **options: Any) -> None:
    """Writes a PIL image atomically, in the format of the file's suffix; `options` are those of `Image.save`."""
    from PIL import Image

    data = io.BytesIO()
    image.save(data, Image.registered_extensions()[path.suffix.lower()], **options)
    write_atomic(path, data.getvalue())


def write_json(path: Path, content: Any) -> None:
    """Write `content` atomically as indented, strict JSON.

    NaN and infinity raise ValueError, because they are not JSON. File names that are not valid Unicode are preserved.
    """
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    # Undecodable bytes in a name are lone surrogates in Python; backslashreplace writes them as JSON's escape \udcXX.
    write_atomic(path, text.encode("utf-8", "backslashreplace"))


def write_synced(path: Path, data: bytes) -> None:
    """Create the new file `path` with `data` and wait until the bytes are on the disk. Raises OSError."""
    require_same_folder(path)
    with open(path, "xb") as file:
        file.write(data)
        fsync_file(file)


def size_text(count: float) -> str:
    """A number of bytes for people: 512 bytes, 3 KiB, 1.5 GiB."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def fsync_file(file: Any) -> None:
    """Wait until everything written to the open `file` is on the disk. Raises OSError."""
    file.flush()
    os.fsync(file.fileno())


def fsync_folder(folder: Path) -> None:
    """Wait until the names in `folder` (files created, renamed, removed) are on the disk. Raises OSError.

    Does nothing where folders cannot be synced: on Windows, without read permission, and on file systems that refuse it (as
    PostgreSQL's fsync_fname_ext). Any other error means that the disk failed.
    """
    if os.name == "nt":
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.ENOSYS):
            raise
    finally:
        os.close(descriptor)
