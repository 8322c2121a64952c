"""Checkpoints: the state of a run at a step. They are written atomically and verified before use.

    checkpoints/step-00000120/state.pt        torch.save of plain tensors, dicts, lists and scalars
    checkpoints/step-00000120/manifest.json   format, step, facts, size and checksum of each file, own checksum

A writer fills a hidden folder next to the checkpoint, syncs it and renames it. A hidden folder that remains was left by a
killed writer.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sushi_research.errors import UserError, first_line
from sushi_research.files import disk_error, fsync_file, fsync_folder, require_same_folder, write_synced
from sushi_research.runs import records
from sushi_research.temporaries import hidden_name
from sushi_research.user_files import MOST_BYTES, UnreadableFile, kind_of, parse_json, read_regular

logger = logging.getLogger(__name__)

# 2: the state of the optimizer is by the names of the tensors.
FORMAT = 2
STATE = "state.pt"
MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{8,})")
_HIDDEN = re.compile(r"\.step-\d{8,}\.[0-9a-f]{8}\.tmp")


class DamagedCheckpoint(Exception):
    """The bytes of a checkpoint are not those that were written. The message says what is wrong."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files have all been verified."""

    path: Path
    step: int
    facts: dict[str, Any]

    def load(self) -> dict[str, Any]:
        """The saved state, with tensors on the CPU. Loads only tensors and plain values (`weights_only`).

        UserError if the file is no state, or if the run folder is another one now: caching may have taken hours since the
        checkpoint was verified.
        """
        require_same_folder(self.path)
        try:
            return torch.load(self.path / STATE, map_location="cpu", weights_only=True)
        except Exception as error:
            # Its bytes were verified, so what was saved was no state, or the file has changed since.
            raise self.foreign(first_line(error)) from error

    def foreign(self, reason: str) -> UserError:
        """The error for a state that is not one of this run, although its bytes are those that were written."""
        return UserError(
            f"{self.path / STATE} does not hold the state of this run ({reason}): remove the folder {self.path.name}, then run "
            "the same command again, which goes on from the checkpoint before it (without one, from the start)"
        )


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], facts: dict[str, Any], keep: int) -> Path:
    """Saves `state` as the checkpoint of `step`, keeps the newest `keep` checkpoints in `folder`, returns the path.

    `state` may contain tensors, dicts, lists, tuples, numbers, strings, booleans and None, at any depth. `facts`
    (samples_seen, epoch, world, identity) is stored in the manifest as JSON. Only one process may call this.

    An intact checkpoint of this step is kept: resuming is exact, so its content is the same, and a folder cannot be
    replaced atomically. A damaged one is replaced. Checkpoints of later steps are removed: they must be damaged,
    because otherwise the run would have continued from them.

    Raises UserError if writing fails. Earlier checkpoints are then untouched.
    """
    assert keep >= 1, keep
    assert_plain(state, "state")
    path = checkpoint_path(folder, step)
    temporary = hidden_name(path)
    require_same_folder(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not _is_intact(path):
            temporary.mkdir()
            _write(temporary, step, state, facts)
            require_same_folder(path)
            if path.exists():
                _remove(path)
            os.rename(temporary, path)
            fsync_folder(folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        require_same_folder(folder)
        raise disk_error(f"cannot save the checkpoint {path}", error) from error
    _prune(folder, step, keep)
    return path


def checkpoint_path(folder: Path, step: int) -> Path:
    """The folder of the checkpoint of a step."""
    return folder / f"step-{step:08d}"


def latest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest intact checkpoint in `folder`, with every byte verified. None if no checkpoint was ever finished.

    Logs a warning for each newer checkpoint that is damaged, with the one used instead. Also removes the hidden folders
    of killed writers, so only the process with the run's lock may call this. Others use `read_checkpoint`.

    Raises UserError if there are checkpoints but all are damaged: starting over is the user's decision.
    """
    if not folder.is_dir():
        return None
    for entry in sorted(folder.iterdir()):
        if _HIDDEN.fullmatch(entry.name):
            require_same_folder(entry)
            try:
                shutil.rmtree(entry)
            except OSError as error:
                raise disk_error(f"cannot remove {entry}, left by a killed run", error) from error
    damaged: list[str] = []
    for step in sorted(_steps(folder), reverse=True):
        path = folder / f"step-{step:08d}"
        try:
            checkpoint = read_checkpoint(path)
        except DamagedCheckpoint as damage:
            damaged.append(f"checkpoint {path} is damaged ({damage})")
            continue
        for sentence in damaged:
            logger.warning("%s; using %s instead", sentence, path.name)
        return checkpoint
    if damaged:
        raise UserError(
            f"{'; '.join(damaged)}: no whole checkpoint is left to continue from; "
            f"delete {folder} to start this run afresh, or give another --run.name"
        )
    return None


def newest_step(folder: Path) -> int | None:
    """The step of the newest checkpoint in `folder` that looks whole (only file sizes are checked), or None."""
    if not folder.is_dir():
        return None
    return max((step for step in _steps(folder) if _looks_whole(folder / f"step-{step:08d}")), default=None)


def checkpoint_of(folder: Path, step: int) -> Checkpoint | None:
    """The checkpoint of a step in `folder` as `read_checkpoint`; None if it is missing or damaged."""
    with contextlib.suppress(DamagedCheckpoint):
        return read_checkpoint(folder / f"step-{step:08d}")
    return None


def read_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in the folder `path`, with every byte verified.

    Raises DamagedCheckpoint, or UserError for a file without read permission or another format version.
    """
    manifest = _read_manifest(path)
    for name, expected in manifest["files"].items():
        _check_size(path / name, expected["bytes"])
        if _digest(path / name) != expected["blake2b"]:
            raise DamagedCheckpoint(f"{name} no longer has the checksum {expected['blake2b']}")
    return Checkpoint(path, manifest["step"], manifest["facts"])


def _write(folder: Path, step: int, state: dict[str, Any], facts: dict[str, Any]) -> None:
    with open(folder / STATE, "xb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            # After a failed write torch closes its archive. That fails too and hides the first error.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
        fsync_file(file)
    entry = {"bytes": (folder / STATE).stat().st_size, "blake2b": _digest(folder / STATE)}
    manifest = {"format": FORMAT, "step": step, "facts": facts, "files": {STATE: entry}}
    manifest["blake2b"] = _manifest_digest(manifest)
    write_synced(folder / MANIFEST, (json.dumps(manifest, indent=2, allow_nan=False) + "\n").encode())
    fsync_folder(folder)


def _prune(folder: Path, step: int, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints up to `step`. Checks file sizes but not checksums."""
    kept = 0
    for other in sorted(_steps(folder), reverse=True):
        path = folder / f"step-{other:08d}"
        if other <= step and kept < keep and _looks_whole(path):
            kept += 1
            continue
        try:
            _remove(path)
        except OSError as error:
            logger.warning("cannot remove the old checkpoint %s: %s", path, error.strerror or error)


def _remove(path: Path) -> None:
    """Renames to a hidden folder, then deletes it, so that a kill never leaves a partial checkpoint under its name."""
    hidden = hidden_name(path)
    require_same_folder(path)
    os.rename(path, hidden)
    fsync_folder(path.parent)
    if hidden.is_dir() and not hidden.is_symlink():
        shutil.rmtree(hidden)
    else:
        hidden.unlink()


def _steps(folder: Path) -> list[int]:
    matches = [_NAME.fullmatch(entry.name) for entry in folder.iterdir()]
    return [int(match[1]) for match in matches if match]


def _is_intact(path: Path) -> bool:
    """Whether every byte is as it was written."""
    try:
        read_checkpoint(path)
    except DamagedCheckpoint:
        return False
    return True


def _looks_whole(path: Path) -> bool:
    """Whether the manifest is valid and every file has the right size. Reads only the manifest."""
    try:
        for name, expected in _read_manifest(path)["files"].items():
            _check_size(path / name, expected["bytes"])
    except DamagedCheckpoint:
        return False
    return True


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = parse_json(read_regular(path / MANIFEST, MOST_BYTES), MANIFEST)
    except UnreadableFile as error:
        if isinstance(error.__cause__, PermissionError):
            raise UserError(f"cannot read {path / MANIFEST}: {error.__cause__.strerror}; make it readable") from error
        raise DamagedCheckpoint(f"{MANIFEST} {error.reason}") from error
    except UserError as error:
        raise DamagedCheckpoint(f"{MANIFEST} is not valid JSON") from error
    if not isinstance(manifest, dict) or "format" not in manifest:
        raise DamagedCheckpoint(f"{MANIFEST} does not hold what was written")
    if manifest["format"] == FORMAT and (problem := records.problem_of(manifest, records.Manifest)):
        raise DamagedCheckpoint(f"{MANIFEST} does not hold what was written ({problem})")
    try:
        whole = manifest.get("blake2b") == _manifest_digest(manifest)
    except ValueError:  # NaN
        whole = False
    if not whole:
        raise DamagedCheckpoint(f"{MANIFEST} does not hold what was written")
    if manifest["format"] == FORMAT and (
        path.name != f"step-{manifest['step']:08d}" or [*manifest["files"]] != [STATE]
    ):
        raise DamagedCheckpoint(f"{MANIFEST} is that of another checkpoint")
    if manifest["format"] != FORMAT:
        raise UserError(
            f"the checkpoint {path} has format {manifest['format']}, this version reads format {FORMAT}; "
            "continue with the version that wrote it, or give another --run.name"
        )
    return manifest


def _check_size(path: Path, expected: int) -> None:
    if not path.is_file():
        raise DamagedCheckpoint(f"{path.name} is {kind_of(path)}")
    if (size := path.stat().st_size) != expected:
        raise DamagedCheckpoint(f"{path.name} has {size} bytes instead of {expected}")


def _manifest_digest(manifest: dict[str, Any]) -> str:
    """Checksum of the manifest without its own checksum, over its canonical JSON."""
    content = {key: value for key, value in manifest.items() if key != "blake2b"}
    return _blake2b(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _digest(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, _blake2b).hexdigest()
    except PermissionError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; make it readable") from error
    except OSError as error:
        raise DamagedCheckpoint(f"{path.name} cannot be read: {error.strerror or error}") from error


def _blake2b(data: bytes = b"") -> Any:
    return hashlib.blake2b(data, digest_size=16)


def assert_plain(value: Any, where: str) -> None:
    """Asserts that `torch.load(weights_only=True)` restores the value unchanged."""
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            assert type(key) in (str, int), f"{where}: the key {key!r} is neither a string nor an integer"
            assert_plain(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):
            assert_plain(item, f"{where}[{index}]")
    else:
        plain = (torch.Tensor, bool, int, float, str, type(None))
        assert type(value) in plain, f"{where} is a {type(value).__name__}, not a tensor or a plain value"
