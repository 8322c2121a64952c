"""System calls of a process as strace logs them, and the choice of those that shall fail.

strace's `--inject=CALL:error=ERROR:when=N` counts the calls of a thread. With `-P PATH` it counts only those that name exactly this
path, or a descriptor of it, so a call is identified by its path and its number among the calls with that path.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_BOTH = ("ENOSPC", "EIO")
# The errors with which each call is tested. A removal needs no space.
ERRORS = {
    "openat": _BOTH,
    "write": _BOTH,
    "pwrite64": _BOTH,
    "writev": _BOTH,
    "fsync": _BOTH,
    "fdatasync": _BOTH,
    "ftruncate": _BOTH,
    "rename": _BOTH,
    "renameat": _BOTH,
    "renameat2": _BOTH,
    "link": _BOTH,
    "linkat": _BOTH,
    "mkdir": _BOTH,
    "mkdirat": _BOTH,
    "unlink": ("EIO",),
    "unlinkat": ("EIO",),
    "rmdir": ("EIO",),
}
_LINE = re.compile(r"(?P<thread>\d+) +(?P<name>\w+)\((?P<arguments>.*)\) += (?P<result>.*)")
_PATH = re.compile(r'<(/[^<>]*)>|"(/[^"]*)"')
_NUMBERS = re.compile(r"[0-9a-f]{8,}|\d+")


class Untraceable(Exception):
    """strace is missing or may not trace other processes here; the message is a reason."""


@dataclass(frozen=True)
class Fault:
    """The `when`-th call `name` with `path` fails with `error`. `path` is relative to the folder that was logged."""

    name: str
    error: str
    path: str
    when: int

    def __str__(self) -> str:
        return f"{self.error} of {self.name} number {self.when} on {self.path}"


@dataclass(frozen=True)
class Call:
    """A call that changes files: its name, its path relative to the logged folder, and its number among those with that path."""

    name: str
    path: str
    when: int

    @property
    def kind(self) -> tuple[str, str]:
        """Calls of one kind differ only in numbers within the path, and in when they come."""
        return self.name, _NUMBERS.sub("#", self.path)


def read_log(text: str, folder: Path, parts: Sequence[str]) -> list[Call]:
    """The calls in strace's log that change something at or below `parts` of `folder`, in order."""
    found, seen = [], Counter()
    for line in text.splitlines():
        match = _LINE.match(line)
        if not match or match["name"] not in ERRORS:
            continue
        paths = [one or other for one, other in _PATH.findall(match["arguments"])]
        paths = [path.removeprefix(f"{folder}/") for path in paths if path.startswith(f"{folder}/")]
        paths = [path for path in dict.fromkeys(paths) if any(f"{path}/".startswith(f"{part}/") for part in parts)]
        if match["name"] == "rename":  # strace compares only its first path
            paths = paths[:1]
        for path in paths:
            seen[match["thread"], match["name"], path] += 1
        reads = match["name"] == "openat" and not re.search("O_WRONLY|O_RDWR|O_CREAT", match["arguments"])
        if paths and not reads:
            found.append(Call(match["name"], paths[0], seen[match["thread"], match["name"], paths[0]]))
    return found


def choose(calls: Sequence[Call], count: int, share: float = 0.0) -> list[Fault]:
    """`count` faults spread evenly over the calls, those of different kinds first. `share` (0 to 1) shifts the choice."""
    seen, first, later = set(), [], []
    for call in calls:
        (later if call.kind in seen else first).append(call)
        seen.add(call.kind)

    def faults(some: Sequence[Call]) -> list[Fault]:
        return [Fault(call.name, error, call.path, call.when) for call in some for error in ERRORS[call.name]]

    one, other = faults(first), faults(later)
    return _even(one, count, share) + _even(other, count - len(one), share)


def _even(found: list[Fault], count: int, share: float) -> list[Fault]:
    if count >= len(found):
        return found
    stride = len(found) / max(count, 1)
    return [found[int((number + share) * stride)] for number in range(max(count, 0))]


def find_strace() -> str:
    """The path of strace. Raises Untraceable."""
    strace = shutil.which("strace")
    if strace is None:
        raise Untraceable("strace is not installed")
    return strace


def attach(pid: int, log: Path, *options: str) -> subprocess.Popen[bytes]:
    """Starts strace on the process `pid` and its later threads; it ends with the process. Raises Untraceable."""
    command = [
        find_strace(),
        "-f",
        "-qq",
        "-y",
        "-s",
        "0",
        "-e",
        "signal=none",
        "-o",
        str(log),
        "-p",
        str(pid),
        *options,
    ]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        process.wait(0.5)
    except subprocess.TimeoutExpired:
        return process
    said = process.stderr.read().decode(errors="replace").strip() if process.returncode else ""
    if said:
        raise Untraceable(f"strace may not trace a process here ({said})")
    return process


def log_options() -> list[str]:
    """Options of strace that log all calls of `ERRORS`."""
    return ["-e", f"trace={','.join(ERRORS)}"]


def fault_options(fault: Fault, folder: Path) -> list[str]:
    """Options of strace that inject `fault` below `folder`."""
    inject = f"inject={fault.name}:error={fault.error}:when={fault.when}"
    return ["-P", str(folder / fault.path), "-e", f"trace={fault.name}", "-e", inject]
