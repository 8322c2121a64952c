"""Reads users' files within bounds: regular files only, never more than a limit, without waiting. Every failure is one sentence."""

from __future__ import annotations

import contextlib
import io
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sushi_research.errors import UserError, first_line

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


def open_regular(path: Path) -> io.BufferedReader:
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
        found = os.fstat(file.fileno())
        _require_regular(path, found)
        if found.st_size == 0 and file.peek(1):
            raise UnreadableFile(
                path, "has content but a size of 0, as files below /proc have", "give a file on a disk"
            )
    except OSError as error:
        file.close()
        raise UnreadableFile(path, f"cannot be read ({error.strerror or error})") from error
    except UserError:
        file.close()
        raise
    return file


def read_regular(path: Path, most: int = MOST_BYTES) -> bytes:
    """The bytes of a user's file.

    Raises UnreadableFile if the file is missing, not readable, not a regular file, or larger than `most` bytes. It neither waits
    for a FIFO nor reads an endless file.
    """
    with open_regular(path) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            data: bytes | None = b""
            if size <= most:
                data = file.read(size + 1)
                if data is not None and len(data) > size:  # it has grown
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
