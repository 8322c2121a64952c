"""Atomic file writes: write a temporary file next to the target, sync it, rename it.

A process may guard a folder, such as its run folder: every write below it then first checks that it is still the same folder.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sushi_research.errors import UserError

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


@contextlib.contextmanager
def readable() -> Iterator[None]:
    """Context manager or decorator for reading a user's files: turns an OSError into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{error.filename} cannot be read ({error.strerror or error}): check the path and the permissions."
        ) from error


def write_atomic(path: Path, data: bytes) -> None:
    """Replace the file at `path` with `data`. If the process is killed, the file has either the old or the new bytes.

    The folder must exist. Raises UserError, and keeps the old file, if the disk is full or the folder is not writable.
    """
    temporary = hidden_name(path)
    try:
        write_synced(temporary, data)
        require_same_folder(path)
        os.replace(temporary, path)
        fsync_folder(path.parent)
    except UserError:
        temporary.unlink(missing_ok=True)
        raise
    except OSError as error:
        with contextlib.suppress(OSError):  # for example where the folder is gone
            temporary.unlink(missing_ok=True)
        require_same_folder(path)
        raise disk_error(f"cannot write {path}", error) from error


def append(path: Path, data: bytes) -> None:
    """Adds `data` to the end of a file, which is created if it is missing. Raises UserError if that fails."""
    require_same_folder(path)
    try:
        with open(path, "ab") as file:
            file.write(data)
    except OSError as error:
        require_same_folder(path)
        raise disk_error(f"cannot write {path}", error) from error


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

    Does nothing on Windows, which cannot open a folder for this.
    """
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems do not support it
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hidden_name(path: Path) -> Path:
    """A new hidden name next to `path`, on the same file system: `.<name>.<8 random hex digits>.tmp`."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def disk_error(what: str, error: OSError) -> UserError:
    """The UserError for a failed write: `what` failed, the reason, and what to do."""
    return UserError(
        f"{what}: {error.strerror or error}; free some space or make the folder writable, "
        "then run the same command again: what was written before is intact"
    )
