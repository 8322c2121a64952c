"""Atomic file writes: write a temporary file next to the target, sync it, rename it."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sushi_research.errors import UserError


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
        os.replace(temporary, path)
        fsync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise disk_error(f"cannot write {path}", error) from error


def write_json(path: Path, content: Any) -> None:
    """Write `content` atomically as indented, strict JSON.

    NaN and infinity raise ValueError, because they are not JSON. File names that are not valid Unicode are preserved.
    """
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    # Undecodable bytes in a name are lone surrogates in Python; backslashreplace writes them as JSON's escape \udcXX.
    write_atomic(path, text.encode("utf-8", "backslashreplace"))


def write_synced(path: Path, data: bytes) -> None:
    """Create the new file `path` with `data` and wait until the bytes are on the disk. Raises OSError."""
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
