"""Makes one call of the system fail in a run: the N-th of a kind that concerns the run folder or the caches."""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Kind -> the functions of `os` that belong to it; the path that counts is the first argument or, for "rename", the second.
KINDS = {
    "fsync": ("fsync",),
    "rename": ("replace", "rename"),
    "mkdir": ("mkdir",),
    "unlink": ("unlink", "remove", "rmdir"),
    "list": ("listdir", "scandir"),
    "stat": ("stat", "lstat"),
    "link": ("link",),
    "truncate": ("ftruncate",),
    "note": ("write",),
    "descriptor": ("open",),
}
# Of `open`: to open a file for reading, to open one for writing, and to write into a file that was opened.
OPENED = ("read", "create", "write")


class FailingCall:
    """Fails call number `number` of a kind below one of `roots`, from 1; `count` is the number of such calls so far."""

    def __init__(self, kind: str, number: int, roots: tuple[Path, ...], code: int) -> None:
        self.kind, self.number, self.code, self.count = kind, number, code, 0
        self.path = ""
        self._roots = tuple(str(root) + os.sep for root in roots)

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for name in KINDS.get(self.kind, ()):
                patch.setattr(os, name, self._failing(getattr(os, name), name))
            if self.kind in OPENED:
                opened = self._opened(builtins.open)
                patch.setattr(builtins, "open", opened)
                patch.setattr(io, "open", opened)
            yield

    def _failing(self, real: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if self._is_due(arguments[1] if self.kind in ("rename", "link") else arguments[0] if arguments else "."):
                raise OSError(self.code, os.strerror(self.code), self.path)
            return real(*arguments, **named)

        return call

    def _opened(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(file: Any, mode: str = "r", *arguments: Any, **named: Any) -> Any:
            writes = mode.strip("bt") != "r"
            if writes == (self.kind == "read") or not self._is_due(file):
                return real(file, mode, *arguments, **named)
            if self.kind != "write":
                raise OSError(self.code, os.strerror(self.code), self.path)
            opened = real(file, mode, *arguments, **named)
            full = os.open("/dev/full", os.O_RDWR)
            os.dup2(full, opened.fileno())
            os.close(full)
            return opened

        return call

    def _is_due(self, target: Any) -> bool:
        if isinstance(target, int):
            try:
                target = os.readlink(f"/proc/self/fd/{target}")
            except OSError:
                return False
        path = os.path.abspath(os.fsdecode(target))
        if not (path + os.sep).startswith(self._roots):
            return False
        self.count += 1
        if self.count == self.number:
            self.path = path
        return self.count == self.number


def failing(kind: str, number: int, *roots: Path, code: int = errno.EIO) -> FailingCall:
    """Call number `number` of a kind below `roots` fails, with a disk error by default."""
    return FailingCall(kind, number, roots, code)
