"""Runs inputs of readers in a process of its own: `python -m testing.fuzz.worker SPANS SEED FOLDER`.

It writes a line before an input and one after it, so that the process that started it can tell which input ended or held it.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
import time
import traceback
from pathlib import Path
from random import Random
from typing import TextIO

from sushi_research.errors import UserError, UserErrors
from testing.fuzz.mutations import mutate
from testing.fuzz.readers import READERS, Reader

# The address space that an input may take beyond what is used before it. Resident memory is bounded by `Reader.memory`.
ADDRESSES = 6 * 2**30
CORPUS = Path(__file__).parents[2] / "tests/fuzz/corpus"


def originals(reader: Reader, template: Path) -> dict[str, bytes]:
    """The files of a reader's folder that are damaged, by name."""
    paths = sorted({path for pattern in reader.files for path in template.glob(pattern) if path.is_file()})
    return {path.relative_to(template).as_posix(): path.read_bytes() for path in paths}


def make_input(reader: Reader, files: dict[str, bytes], seed: int, number: int) -> tuple[str, bytes]:
    """(name of the file, its bytes) of an input: a function of the reader, the seed and the number."""
    random = Random(f"{reader.name} {seed} {number}")
    names = sorted(files)
    # Most places of a text matter; of a file of bytes only few, such as an offset.
    name = random.choices(names, [4 if b"\0" in files[name] else 1 for name in names])[0]
    return name, mutate(files[name], list(files.values()), random)


def corpus(reader: Reader) -> list[tuple[str, str, bytes]]:
    """(label, name of the file, its bytes) of the inputs that failed once; `--` stands for / in their file names."""
    folder = CORPUS / reader.name.replace(" ", "_")
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    return [(path.name, path.name.partition("__")[2].replace("--", "/"), path.read_bytes()) for path in paths]


def attempt(reader: Reader, template: Path, folder: Path, name: str, data: bytes) -> tuple[str, str]:
    """("accepted" or "refused", "") after reading one input, or ("failed", why)."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(template, folder)
    (folder / name).write_bytes(data)
    before = _reset_peak()
    try:
        reader.read(folder, name)
        outcome, detail = "accepted", ""
    except (UserError, *reader.refuses()) as error:
        outcome, detail = "refused", ""
        if not str(error).strip() or ("\n" in str(error) and not isinstance(error, UserErrors)):
            outcome, detail = "failed", f"not one line: {str(error)[:200]!r}"
    except BaseException as error:
        place = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in place if "sushi_research" in frame.filename] or place
        where = f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""
        outcome, detail = "failed", f"{type(error).__name__} at {where}: {str(error)[:200]!r}"
    grown = _peak() - before
    if outcome != "failed" and grown > reader.memory:
        outcome, detail = "failed", f"took {grown / 2**20:.0f} MiB"
    return outcome, detail


def _status(key: str) -> int:
    """A line of /proc/self/status, in bytes; 0 where there is no such file."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), 0)


def _reset_peak() -> int:
    """Forgets the peak of the resident memory; returns what is resident now."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return sys.maxsize  # it cannot be measured here
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def main(arguments: list[str]) -> None:
    """SPANS is JSON: [reader, first, last] of each span of inputs, `last` excluded."""
    spans, seed, root = json.loads(arguments[0]), int(arguments[1]), Path(arguments[2])
    out = os.fdopen(os.dup(1), "w", buffering=1)
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    for name, first, last in spans:
        print(f"reader\t{name}", file=out)
        _read_all(next(each for each in READERS if each.name == name), seed, range(first, last), root, out)
    print("done", file=out)


def _read_all(reader: Reader, seed: int, numbers: range, root: Path, out: TextIO) -> None:
    """First the sound files, which must be accepted, then the corpus if the numbers begin with 0, then the inputs."""
    template, folder = root / "template", root / "input"
    shutil.rmtree(template, ignore_errors=True)
    template.mkdir(parents=True)
    reader.make(template)
    files = originals(reader, template)
    for name, data in files.items():
        outcome, detail = attempt(reader, template, folder, name, data)
        if outcome != "accepted":
            print(f"broken\t{name}\t{detail or 'refused'}", file=out)
            sys.exit(1)
    if _status("VmSize"):
        resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + ADDRESSES, resource.RLIM_INFINITY))
    inputs = [*(corpus(reader) if numbers.start == 0 else []), *((str(number), None, b"") for number in numbers)]
    for label, name, data in inputs:
        if name is None:
            name, data = make_input(reader, files, seed, int(label))
        (root / "current").write_bytes(data)
        print(f"start\t{label}\t{name}", file=out)
        start = time.monotonic()
        outcome, detail = attempt(reader, template, folder, name, data)
        if outcome == "failed":  # not read from "current", which soon has the next input
            (root / f"failed-{label}").write_bytes(data)
        print(f"end\t{label}\t{outcome}\t{time.monotonic() - start:.3f}\t{' '.join(detail.split())}", file=out)


if __name__ == "__main__":
    main(sys.argv[1:])
