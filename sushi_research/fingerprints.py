"""Which bytes a file holds: content hashes, remembered between runs for as long as the file stays as it is."""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sushi_research.errors import UserError
from sushi_research.files import write_atomic

# Raise it when what is noted changes, or what `images.decode` accepts: a hash cache of another version is not read.
HASH_CACHE_VERSION = 2
# A file written this shortly before it was read could be written again without its modification time moving on
# (FAT keeps two seconds, ext4 some milliseconds). git knows the same trap as "racy" index entries.
RACY_NS = 2_000_000_000


def content_hash(data: bytes) -> str:
    """The blake2b hash of `data` as 32 hex digits."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


@dataclass(frozen=True)
class FileState:
    """What tells one version of a file from another (bytes, nanoseconds), and when that was looked up."""

    size: int
    mtime_ns: int
    seen_ns: int


def file_state(path: Path) -> FileState:
    """The state of a file, to be taken before it is read. Raises OSError when there is no such file."""
    seen_ns = time.time_ns()
    status = os.stat(path)
    return FileState(size=status.st_size, mtime_ns=status.st_mtime_ns, seen_ns=seen_ns)


class HashCache:
    """Facts about files in one JSON file, believed only while a file's size and modification time stay equal.

    A damaged hash cache, or one of another version, is started afresh: all that it holds can be found out again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries: dict[str, dict[str, Any]] = {}
        self.load()

    def load(self) -> None:
        """Read the hash cache file, which another process may have written since; what it does not hold is kept."""
        try:
            stored = json.loads(self.path.read_bytes())
        except (OSError, ValueError):
            return
        if _is_sound(stored):
            self._entries |= stored["files"]

    def get(self, path: Path) -> dict[str, Any] | None:
        """The facts noted about this file, or None when there are none or the file has changed since."""
        entry = self._entries.get(os.path.abspath(path))
        if entry is None:
            return None
        try:
            status = os.stat(path)
        except OSError:
            return None
        unchanged = (entry["size"], entry["mtime_ns"]) == (status.st_size, status.st_mtime_ns)
        return dict(entry["facts"]) if unchanged else None

    def put(self, path: Path, facts: dict[str, Any], state: FileState) -> None:
        """Note JSON `facts`, read from the file after `state` was taken, in place of what was noted before.

        Nothing is noted about a file that was modified less than RACY_NS before `state` was taken. A change
        during the reading needs no care: the file's modification time is no longer the one in `state` then.
        """
        key = os.path.abspath(path)
        if state.seen_ns - state.mtime_ns <= RACY_NS:
            self._entries.pop(key, None)
        else:
            self._entries[key] = {"size": state.size, "mtime_ns": state.mtime_ns, "facts": dict(facts)}

    def save(self) -> None:
        """Write the hash cache, whole or not at all; where nothing can be written, later runs look again."""
        content = json.dumps({"version": HASH_CACHE_VERSION, "files": self._entries})
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self.path, content.encode())
        except (OSError, UserError):
            pass


def _is_sound(stored: Any) -> bool:
    """Whether the contents of a hash cache file have the form that this version writes."""
    return (
        isinstance(stored, dict)
        and stored.get("version") == HASH_CACHE_VERSION
        and isinstance(stored.get("files"), dict)
        and all(
            isinstance(entry, dict)
            and entry.keys() == {"size", "mtime_ns", "facts"}
            and isinstance(entry["facts"], dict)
            for entry in stored["files"].values()
        )
    )


def file_hash(path: Path, hash_cache: HashCache) -> str:
    """`content_hash` of a file's bytes, read in small pieces, or from the hash cache when the file is unchanged.

    Raises OSError when the file cannot be read.
    """
    facts = hash_cache.get(path) or {}
    if "hash" not in facts:
        state = file_state(path)
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
        facts["hash"] = digest.hexdigest()
        hash_cache.put(path, facts, state)
    return facts["hash"]


def folder_hash(paths: list[Path], hash_cache: HashCache) -> str:
    """One hash for a model component's files: their contents, and their names below their common folder.

    The order of `paths` and the place of the folder do not matter. Raises OSError as `file_hash` does.
    """
    assert paths, "a component has at least one file"
    root = os.path.commonpath([os.path.abspath(path.parent) for path in paths])
    files = {Path(os.path.relpath(os.path.abspath(path), root)).as_posix(): path for path in paths}
    return content_hash(json.dumps([[name, file_hash(files[name], hash_cache)] for name in sorted(files)]).encode())
