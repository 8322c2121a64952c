"""Gives damaged and hostile files to the suite's readers, which must read or refuse them.

    make fuzz MINUTES=30
    python -m testing.fuzz --inputs 1000 --only tables images
    python -m testing.fuzz --minutes 30 --write docs/testing.md

Inputs are changes of small real files (testing/fuzz/mutations.py), a function of reader, seed and number. Each reader
(testing/fuzz/readers.py) runs in processes of its own. An input fails if it ends in anything but a value or the reader's refusal
in one line, ends the process, takes longer than SECONDS, or takes more memory than the reader's bound. Its bytes are then kept in
tests/fuzz/corpus, which is read first at every start. Exit status: 0 if none failed, 1 if one did, 2 for a mistake.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from sushi_research import stopping
from sushi_research.config.process import run_main
from sushi_research.errors import UserError, nearest
from sushi_research.progress import progress
from testing.fuzz.readers import READERS, Reader
from testing.fuzz.worker import CORPUS
from testing.result_pages import around_table, circumstances, markdown, write_table

ROOT = Path(__file__).parents[2]
TABLE = "fuzz"  # the name of the table in its page
# For an input, and for a process to start; a busy machine is several times slower than an idle one.
SECONDS, STARTING = 30, 120
# How many inputs a process reads before another one starts.
BATCH = 500


@dataclass
class Count:
    """What became of the inputs of a reader. `failures` are (label, file name, why), one for each reason."""

    accepted: int = 0
    refused: int = 0
    failed: int = 0
    slowest: float = 0.0
    failures: list[tuple[str, str, str]] = field(default_factory=list)

    @property
    def inputs(self) -> int:
        """How many inputs were read."""
        return self.accepted + self.refused + self.failed


@dataclass(frozen=True)
class Span:
    """The inputs `first` to `last` - 1 of a reader; with 0 begins the corpus."""

    reader: Reader
    first: int
    last: int


def run_spans(spans: Sequence[Span], seed: int, counts: dict[str, Count], step: Callable[[], object]) -> None:
    """Reads the inputs in one process, and in another one after each input that ends or holds it. `counts` are by reader."""
    todo = list(spans)
    while todo:
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            listed = json.dumps([[span.reader.name, span.first, span.last] for span in todo])
            words = [sys.executable, "-m", "testing.fuzz.worker", listed, str(seed), folder]
            process = subprocess.Popen(words, cwd=ROOT, env=_environment(folder), stdout=subprocess.PIPE)
            try:
                ended = _follow(process, Path(folder), todo, counts, step)
            finally:
                process.kill()
                process.wait()
        if ended is None:
            return
        index, label = ended
        span = todo[index]
        # An input of the corpus has no number: what is after one that ends the process is left out, since it has failed anyway.
        todo = [Span(span.reader, int(label) + 1 if label.isdigit() else 1, span.last), *todo[index + 1 :]]


def _follow(
    process: subprocess.Popen[bytes],
    folder: Path,
    spans: Sequence[Span],
    counts: dict[str, Count],
    step: Callable[[], object],
) -> tuple[int, str] | None:
    """Counts the outcomes that a worker writes. Returns (index of the span, label) of the input that ended or held it, or None."""
    assert process.stdout is not None
    waiting = selectors.DefaultSelector()
    waiting.register(process.stdout, selectors.EVENT_READ)
    rest, index, current, since = b"", -1, ("", ""), time.monotonic()
    while True:
        limit = SECONDS if current[0] else STARTING
        if not waiting.select(max(0.0, since + limit - time.monotonic())):
            why = f"took more than {limit} s"
            break
        data = os.read(process.stdout.fileno(), 65536)
        if not data:
            status = process.wait()
            why = (
                f"ended the process by {signal.Signals(-status).name}"
                if status < 0
                else f"ended the process with {status}"
            )
            break
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            kind, *words = line.decode(errors="replace").split("\t")
            since = time.monotonic()
            if kind == "reader":
                index += 1
            elif kind == "start":
                current = words[0], words[1]
            elif kind == "end":
                _, outcome, seconds, detail = words
                reader = spans[index].reader
                _count(counts[reader.name], outcome, float(seconds))
                if outcome == "failed":
                    _keep(counts[reader.name], reader, current, detail, (folder / f"failed-{current[0]}").read_bytes())
                current = ("", "")
                step()
            elif kind == "broken":
                name = spans[index].reader.name
                raise UserError(
                    f"the reader {name} does not accept its own file {words[0]} ({words[1]}): correct the reader."
                )
            elif kind == "done":
                return None
    if not current[0]:
        raise UserError(
            f"the process of {spans[max(index, 0)].reader.name} {why} before an input: run its worker by hand."
        )
    reader = spans[index].reader
    _count(counts[reader.name], "failed", time.monotonic() - since)
    _keep(counts[reader.name], reader, current, why, (folder / "current").read_bytes())
    step()
    return index, current[0]


def _count(count: Count, outcome: str, seconds: float) -> None:
    setattr(count, outcome, getattr(count, outcome) + 1)
    count.slowest = max(count.slowest, seconds)


def _keep(count: Count, reader: Reader, current: tuple[str, str], why: str, data: bytes) -> None:
    """Writes an input that failed to the corpus, unless another one failed for the same reason."""
    label, name = current
    if any(why == other for _, _, other in count.failures):
        return
    count.failures.append((label, name, why))
    path = CORPUS / reader.name.replace(" ", "_") / f"{hashlib.sha256(data).hexdigest()[:8]}__{name.replace('/', '--')}"
    if label != path.name:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def _environment(folder: str) -> dict[str, str]:
    """One thread, no network, and everything that libraries write is in the temporary folder."""
    fixed = {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "ARROW_DEFAULT_MEMORY_POOL": "system",
        "WANDB_MODE": "disabled",
    }
    places = {"HF_DATASETS_CACHE": f"{folder}/hf", "HF_HOME": f"{folder}/home", "TMPDIR": folder}
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return {**os.environ, **fixed, **places, "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"}


def table(counts: dict[str, Count], seed: int, minutes: float) -> str:
    """The results as a Markdown table, and the failures below it."""
    rows: list[list[object]] = []
    for name, count in counts.items():
        rows.append([name, count.inputs, count.accepted, count.refused, count.failed, f"{count.slowest:.1f}"])
    total = [
        sum(getattr(count, key) for count in counts.values()) for key in ("inputs", "accepted", "refused", "failed")
    ]
    slowest = max((count.slowest for count in counts.values()), default=0.0)
    rows.append(["all", *(f"{number:,}" for number in total), f"{slowest:.1f}"])
    lines = markdown(["reader", "inputs", "accepted", "refused", "failed", "slowest (s)"], rows)
    failures = [
        f"- {name} {label} ({file}): {why}" for name, count in counts.items() for label, file, why in count.failures
    ]
    note = f"Seed {seed}, {minutes:.0f} minutes. {circumstances(('pillow', 'pyarrow', 'datasets', 'torch'))}"
    return "\n".join([*lines, "", note, *([""] + failures if failures else [])])


def run(readers: Sequence[Reader], seed: int, minutes: float | None, inputs: int, jobs: int) -> dict[str, Count]:
    """Runs all readers in turns, `jobs` at a time, until the minutes are over, or `inputs` inputs each if `minutes` is None."""
    counts = {reader.name: Count() for reader in readers}
    start, batch = time.monotonic(), min(BATCH, inputs)
    total = None if minutes is not None else len(readers) * inputs
    with ThreadPoolExecutor(jobs) as pool, progress(total=total, description="fuzzing", unit="input") as bar:

        def work(reader: Reader, first: int) -> None:
            if minutes is None or time.monotonic() - start < 60 * minutes:
                last = min(first + batch, inputs) if minutes is None else first + batch
                run_spans([Span(reader, first, last)], seed, counts, bar.update)
                bar.set_postfix_str(f"{sum(count.failed for count in counts.values())} failed")

        first = 0
        while first < inputs if minutes is None else time.monotonic() - start < 60 * minutes:
            for done in [pool.submit(work, reader, first) for reader in readers]:
                done.result()
            first += batch
            if minutes is not None:  # the total that the rate so far leads to, so that the bar has an end
                bar.total = round(bar.n * max(1.0, 60 * minutes / (time.monotonic() - start)))
    return counts


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m testing.fuzz", description="Gives damaged files to the suite's readers."
    )
    add = parser.add_argument
    add("--minutes", type=float, help="how long to go on; default: until --inputs are read")
    add("--inputs", type=int, default=1000, help="inputs for each reader (default: 1000)")
    add("--seed", type=int, default=0, help="seed of the inputs (default: 0)")
    add("--only", nargs="+", metavar="READER", help="only these readers")
    add("--jobs", type=int, default=2, help="processes at a time (default: 2)")
    add("--write", type=Path, metavar="FILE", help="write the table between the marks in this page")
    found = parser.parse_args(arguments)
    if found.jobs < 1 or found.inputs < 1 or (found.minutes is not None and found.minutes <= 0):
        parser.error("--jobs and --inputs are at least 1, --minutes above 0")
    if found.write and found.only:
        parser.error("--write needs the results of all readers: leave --only out")
    return found


def main(arguments: Sequence[str]) -> int:
    """Runs the command; returns the exit status."""
    options = parse(arguments)
    known = [reader.name for reader in READERS]
    for name in options.only or []:
        if name not in known:
            raise UserError(f"no reader is called {name}{nearest(name, known)}: they are {', '.join(known)}.")
    if options.write:
        around_table(options.write, TABLE)  # a page without marks is refused before the work, not after it
    readers = [reader for reader in READERS if not options.only or reader.name in options.only]
    start = time.monotonic()
    with stopping.doing(
        "fuzzing", "the inputs that failed are kept in tests/fuzz/corpus; the same command again starts over"
    ):
        counts = run(readers, options.seed, options.minutes, options.inputs, options.jobs)
    text = table(counts, options.seed, (time.monotonic() - start) / 60)
    print(text)
    if options.write:
        write_table(options.write, TABLE, text)
    return int(any(count.failed for count in counts.values()))


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
