"""Content hashes of files, cached between runs until the file changes."""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sushi_research.errors import UserError
from sushi_research.files import make_folder, write_atomic
from sushi_research.user_files import open_regular, parse_json, read_regular

# Increment it when the stored facts change. A hash cache of another version is ignored. Until 5 it had facts about images too.
HASH_CACHE_VERSION = 6
# If a file was changed less than this before it was read, it could change again with the same times (the resolution is two
# seconds on FAT, some milliseconds on ext4). Compare git's "racy" index entries.
RACY_NS = 2_000_000_000


def content_hash(data: bytes) -> str:
    """The blake2b hash of `data` as 32 hex digits."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


@dataclass(frozen=True)
class FileState:
    """Everything that differs if a file was replaced or changed, and when it was read; times in nanoseconds.

    Size and modification time are not enough: archives, `cp -p` and `touch -d` set the time, and all SDXL VAEs are equally
    large. Programs cannot set the change time, and another file has another inode. On Windows the change time is the time of
    creation. The device is not included: a network mount may get another number each time it is mounted.
    """

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    seen_ns: int

    @property
    def key(self) -> list[int]:
        """What must be equal for the file to count as unchanged."""
        return [self.size, self.mtime_ns, self.ctime_ns, self.inode]


def file_state(path: Path) -> FileState:
    """The state of a file; call it before reading the file. Raises OSError if there is no such file."""
    seen_ns = time.time_ns()
    status = os.stat(path)
    return FileState(
        size=status.st_size,
        mtime_ns=status.st_mtime_ns,
        ctime_ns=status.st_ctime_ns,
        inode=status.st_ino,
        seen_ns=seen_ns,
    )


class HashCache:
    """Facts about files in one JSON file, each valid while the file's size, times and inode are unchanged.

    A damaged cache, or one of another version, is ignored: everything in it can be computed again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries: dict[str, dict[str, Any]] = {}
        self.load()

    def load(self) -> None:
        """Read the cache file, which another process may have written since, and merge it into the entries."""
        try:
            # An entry has 300 bytes.
            stored = parse_json(read_regular(self.path, 2**30), "the hash cache")
        except (OSError, ValueError):
            return
        if _is_sound(stored):
            self._entries |= stored["files"]

    def get(self, path: Path) -> dict[str, Any] | None:
        """The facts stored about this file; None if there are none or the file has changed since."""
        entry = self._entries.get(os.path.abspath(path))
        if entry is None:
            return None
        try:
            unchanged = entry["state"] == file_state(path).key
        except OSError:
            return None
        return dict(entry["facts"]) if unchanged else None

    def put(self, path: Path, facts: dict[str, Any], state: FileState) -> None:
        """Store JSON `facts` about a file that was read after `state` was taken; replaces earlier facts.

        Nothing is stored about a file that was changed less than RACY_NS before `state` was taken. If the file changed while it
        was read, its state differs from `state`, so the facts are not used.
        """
        key = os.path.abspath(path)
        if state.seen_ns - max(state.mtime_ns, state.ctime_ns) <= RACY_NS:
            self._entries.pop(key, None)
        else:
            self._entries[key] = {"state": state.key, "facts": dict(facts)}

    def save(self) -> None:
        """Write the cache atomically. If it cannot be written, later runs compute the facts again."""
        content = json.dumps({"version": HASH_CACHE_VERSION, "seal": _seal(self._entries), "files": self._entries})
        try:
            make_folder(self.path.parent)
            write_atomic(self.path, content.encode())
        except UserError:
            pass


def _seal(entries: Any) -> str:
    """The hash of the entries: with it, damage that is still JSON is noticed."""
    return content_hash(json.dumps(entries).encode())


def _is_sound(stored: Any) -> bool:
    """Whether the contents of a cache file are undamaged and of this version."""
    return (
        isinstance(stored, dict)
        and stored.get("version") == HASH_CACHE_VERSION
        and isinstance(stored.get("files"), dict)
        and stored.get("seal") == _seal(stored["files"])
    )


def file_hash(path: Path, hash_cache: HashCache) -> str:
    """`content_hash` of a file's bytes, from the hash cache if the file is unchanged. Raises OSError if it cannot be read."""
    state = file_state(path)  # before the cache is asked: what is added to its facts must be about the same file
    facts = hash_cache.get(path) or {}
    if "hash" not in facts:
        with open_regular(path) as file:
            facts["hash"] = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        hash_cache.put(path, facts, state)
    return facts["hash"]


def folder_hash(paths: list[Path], hash_cache: HashCache) -> str:
    """One hash of a model component's files: their contents, and their names relative to their common folder.

    It depends neither on the order of `paths` nor on the folder's location. Raises OSError as `file_hash` does.
    """
    assert paths, "a component has at least one file"
    root = os.path.commonpath([os.path.abspath(path.parent) for path in paths])
    files = {Path(os.path.relpath(os.path.abspath(path), root)).as_posix(): path for path in paths}
    return content_hash(json.dumps([[name, file_hash(files[name], hash_cache)] for name in sorted(files)]).encode())
