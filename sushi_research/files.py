"""Reads users' files within bounds. Writes files atomically: a temporary file next to the target, synced, then renamed.

A failed write is a `CannotWrite`, which names the path and the reason.

A process may guard a folder, such as its run folder: every write below it then first checks that it is still the same folder.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from sushi_research.errors import UserError, first_line
from sushi_research.temporaries import temporary_file

if TYPE_CHECKING:
    from PIL import Image

# Configs, indexes and records are below 1 MiB; the largest tokenizer.json on the Hub is about 35 MiB.
MOST_BYTES = 64 * 2**20
# The longest path and name of a file in bytes (PATH_MAX less its zero byte, and NAME_MAX, of Linux; no other system has more).
MOST_PATH = 4095
MOST_NAME = 255
# Nothing that the suite reads is nested more than about ten deep; Python's own functions fail from about 1000.
MOST_NESTED = 100

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}

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


@contextlib.contextmanager
def readable() -> Iterator[None]:
    """Context manager or decorator for reading a user's files: turns an OSError into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{error.filename} cannot be read ({error.strerror or error}): check the path and the permissions."
        ) from error


def expand_path(text: str, *, key: str = "") -> str:
    """A path as the user gives it, with `~` or `~name` at its start replaced by that home folder.

    Raises UserError if no system has such a path, or for an unknown user. The sentence begins with `key`, the name of the
    setting, and the path; without a key it can follow them.
    """
    problem, expanded = None, os.path.expanduser(text)
    if not text:
        problem = "it is empty, and a path is needed"
    elif "\0" in text:
        problem = "it contains a zero byte, which no path can: remove it"
    elif text.startswith("~") and expanded == text:
        user = text[1:].partition(os.sep)[0] or "a user"
        problem = f"it names the home folder of {user}, whom this machine does not know: write out the path"
    elif len(os.fsencode(expanded)) > MOST_PATH or max(map(len, os.fsencode(expanded).split(b"/"))) > MOST_NAME:
        problem = f"it has {len(text):,} letters, which is too long for a path: shorten it"
    if problem:
        raise UserError(f"{key} is {text}: {problem}" if key and text else f"{key}: {problem}" if key else problem)
    return expanded


class UnreadableFile(UserError):
    """A user's file that cannot be read. `reason` completes a sentence that begins with the file's name."""

    def __init__(self, path: Path, reason: str, advice: str = "check the path and the permissions") -> None:
        super().__init__(f"{path} {reason}: {advice}")
        self.reason = reason


def open_regular(path: Path) -> BinaryIO:
    """Opens a user's file for reading. Raises UnreadableFile if that fails or it is not a regular file; never waits for a FIFO."""
    try:
        # A special file is not even opened: that can wait for a writer, or move a tape.
        _require_regular(path, os.stat(path))
        file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)))
    except FileNotFoundError:
        raise UnreadableFile(path, "does not exist", "check the path") from None
    except OSError as error:
        raise UnreadableFile(path, f"cannot be read ({error.strerror or error})") from error
    except UserError:
        raise
    except ValueError:
        raise UnreadableFile(path, "is not a path, because it contains a zero byte", "correct it") from None
    try:
        _require_regular(path, os.fstat(file.fileno()))
    except UserError:
        file.close()
        raise
    return file


def read_regular(path: Path, most: int = MOST_BYTES) -> bytes:
    """The bytes of a user's file.

    Raises UnreadableFile if the file is missing, not readable, not a regular file, or larger than `most` bytes. It neither waits
    for a FIFO nor reads an endless file, such as some below /proc, whose size is said to be 0.
    """
    with open_regular(path) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            data: bytes | None = b""
            if size <= most:
                data = file.read(size + 1)
                if data is not None and len(data) > size:  # it has grown, or its size is not known
                    data += file.read(most + 1 - len(data)) or b""
        except OSError as error:
            raise UnreadableFile(path, f"cannot be read ({error.strerror or error})") from error
    if data is None:
        raise UnreadableFile(path, "gives no bytes, because it waits for another program", "give a complete file")
    if max(size, len(data)) > most:
        length = f" (it has {size:,})" if size > most else ""
        advice = "check that it is the right file"
        raise UnreadableFile(path, f"is larger than {most:,} bytes{length}, the most that is read here", advice)
    return data


def parse_json(text: str | bytes, where: str, remedy: str = "correct it", *, unique_keys: bool = False) -> Any:
    """The value in JSON text. Texts in it can have halves of surrogate pairs, as names that are not valid Unicode do.

    Raises UserError if it is not valid JSON, is nested more than 100 deep or has a number of more than 4300 digits, or with
    `unique_keys` if a key occurs twice. The sentence begins with `where` (the file, and the line if it has several) and ends with
    `remedy`.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique if unique_keys else None)
    except RecursionError:
        raise UserError(f"{where} is nested more than {MOST_NESTED} deep: {remedy}") from None
    except ValueError as error:
        reason = "it is not UTF-8 text" if isinstance(error, UnicodeError) else first_line(error)
        raise UserError(f"{where} is not valid JSON ({reason}): {remedy}") from None
    opening = ("[", "{") if isinstance(text, str) else (b"[", b"{")
    if sum(map(text.count, opening)) > MOST_NESTED and _depth(value) > MOST_NESTED:  # type: ignore[arg-type]
        raise UserError(f"{where} is nested more than {MOST_NESTED} deep: {remedy}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _depth(value: Any) -> int:
    """How deep lists and mappings are nested in `value`, counted to one more than MOST_NESTED."""
    depth, level = 0, [value]
    while depth <= MOST_NESTED and (level := [item for item in level if isinstance(item, list | dict)]):
        depth += 1
        level = [child for item in level for child in (item.values() if isinstance(item, dict) else item)]
    return depth


def _require_regular(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise UnreadableFile(path, f"is {_kind(found)}, and a regular file is needed here", "check the path")


def kind_of(path: Path) -> str:
    """What is at `path`, for a message: "a file", "a folder", "a FIFO", "a broken link"."""
    try:
        return _kind(os.stat(path))
    except OSError:
        return "a broken link" if path.is_symlink() else "missing"


def _kind(found: os.stat_result) -> str:
    return "a file" if stat.S_ISREG(found.st_mode) else _KINDS.get(stat.S_IFMT(found.st_mode), "a special file")


class CannotWrite(UserError):
    """A write that failed. `reason` is the message without the advice: what failed, and why."""

    def __init__(self, reason: str, advice: str) -> None:
        super().__init__(f"{reason}; {advice}")
        self.reason = reason


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


def write_atomic(path: Path, data: bytes) -> None:
    """Replace the file at `path` with `data`. If the process is killed, the file has either the old or the new bytes.

    The folder must exist. Raises CannotWrite, and leaves no temporary file, if the disk is full or the folder is not writable.
    """
    with writing("write", path):
        with temporary_file(path) as (file, temporary):
            file.write(data)
            fsync_file(file)
            require_same_folder(path)
            if os.name == "nt":
                file.close()  # an open file cannot be renamed there
            os.replace(temporary, path)
        fsync_folder(path.parent)


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
