"""The faults of fault injection: each starts a run, damages it, starts the same command again and compares with the
uninterrupted run."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sushi_research.progress import progress
from testing.launches import STEPS, Launch, Launcher, Setup, last_step, mount_tmpfs, unmount
from testing.run_equality import differences


@dataclass
class Reference:
    """The uninterrupted run of a setup: its folder and cache, its duration, and how often it synced and renamed files."""

    run: Path
    cache: Path
    seconds: float
    writes: int


@dataclass
class FaultTest:
    """One test. `events`: what was done; `wrong`: what differs from the reference; `skipped`: why it could not be run;
    `status`: the exit status of the run whose disk failed."""

    number: int
    kind: str
    setup: Setup
    status: int | None = None
    events: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    skipped: str = ""


def run_tests(tests: Sequence[FaultTest], inject: Callable[[FaultTest, Path], None], folder: Path) -> None:
    """Calls `inject(test, place)` for each test, with a bar. Removes the files of those in which nothing is wrong."""
    for test in progress(tests, description="injecting faults", unit="test"):
        place = folder / f"test-{test.number:03d}"
        try:
            inject(test, place)
        except (TimeoutError, AssertionError) as error:
            test.wrong.append(f"{type(error).__name__}: {error}")
        if not test.wrong:
            shutil.rmtree(place, ignore_errors=True)


def report_wrong(tests: Sequence[FaultTest], folder: Path, keep: bool) -> int:
    """Prints what went wrong and returns the exit status. Removes the folder of the tests if nothing did, unless `keep`."""
    wrong = [test for test in tests if test.wrong]
    for test in wrong:
        print(f"test {test.number} ({test.kind}, {test.setup.name}): {'; '.join(test.events)}", file=sys.stderr)
        print(f"  differs: {'; '.join(test.wrong[:3])}", file=sys.stderr)
    if wrong:
        print(f"{len(wrong)} of {len(tests)} tests differ; their files are in {folder}", file=sys.stderr)
    elif not keep:
        shutil.rmtree(folder)
    return int(bool(wrong))


def finish(test: FaultTest, launcher: Launcher, reference: Reference, place: Path, name: str = "run") -> None:
    """Starts the command again without a fault, and compares."""
    launch = launcher.start(test.setup, place / "runs", place / "cache", name)
    statuses = launch.wait()
    if statuses != [0] * test.setup.world:
        test.wrong.append(f"the resumed run ended with {statuses}: {launch.text()[-300:]}")
        return
    test.wrong += differences(place / "runs" / name, reference.run)


def killed(test: FaultTest, launcher: Launcher, reference: Reference, place: Path, rng: np.random.Generator) -> None:
    for _ in range(rng.integers(1, 4)):
        launch = launcher.start(test.setup, place / "runs", place / "cache")
        time.sleep(rng.uniform(0.05, 1.0) * reference.seconds)
        launch.kill(int(rng.integers(test.setup.world)))
        test.events.append(f"killed at step {last_step(place / 'runs/run')}")
    finish(test, launcher, reference, place)


def killed_writing(
    test: FaultTest, launcher: Launcher, reference: Reference, place: Path, rng: np.random.Generator
) -> None:
    for _ in range(rng.integers(1, 4)):
        count = int(rng.integers(1, reference.writes + 1))
        launch = launcher.start(test.setup, place / "runs", place / "cache", die_at=count)
        statuses = launch.wait()
        left = [path.name for path in place.rglob(".*") if path.name.endswith(".tmp")]
        what = left[0].split(".")[1] if left else "between files"
        test.events.append(
            f"killed before write {count} at step {last_step(place / 'runs/run')} ({what}), {statuses[0]}"
        )
    finish(test, launcher, reference, place)


def _signalled(
    number: int, test: FaultTest, launcher: Launcher, reference: Reference, place: Path, rng: np.random.Generator
) -> None:
    launch = stop_at(test, launcher, place, int(rng.integers(1, STEPS)), number, rng)
    statuses = set(launch.wait())
    # A run stops at the end of its current step. One that had just finished its last step exits with 0.
    if not statuses <= {128 + number, 128 + signal.SIGTERM, 0}:
        test.wrong.append(f"stopped with {statuses}: {launch.text()[-300:]}")
    test.events.append(f"stopped at step {last_step(place / 'runs/run')}")
    finish(test, launcher, reference, place)


def stop_at(
    test: FaultTest, launcher: Launcher, place: Path, step: int, number: int, rng: np.random.Generator
) -> Launch:
    """A launch of which one process was sent the signal `number` once the run had logged `step`."""
    launch = launcher.start(test.setup, place / "runs", place / "cache")
    while last_step(place / "runs/run") < step and all(process.is_alive() for process in launch.processes):
        time.sleep(0.005)
    process = launch.processes[int(rng.integers(test.setup.world))]
    if process.is_alive():
        os.kill(process.pid, number)
    return launch


def sigterm(*arguments: object) -> None:
    _signalled(signal.SIGTERM, *arguments)


def sigint(*arguments: object) -> None:
    _signalled(signal.SIGINT, *arguments)


def refused(test: FaultTest, launch: Launch, what: str) -> None:
    """Checks a run whose disk is full or limited: one sentence, status 2, no traceback."""
    status, text = launch.wait()[0], launch.text()
    test.status = status
    sentences = [line for line in text.splitlines() if line.startswith("error: ")]
    test.events.append(f"{what}: status {status}{f', {sentences[0][:70]}' if sentences else ''}")
    traceback = "Traceback" in text and test.setup.world == 1
    if (status != 0 and (status != 2 or len(sentences) != 1)) or traceback:
        test.wrong.append(f"{what} ended with {status} and said {text[-400:]!r}")


def file_limit(
    test: FaultTest, launcher: Launcher, reference: Reference, place: Path, rng: np.random.Generator
) -> None:
    sizes = [
        path.stat().st_size
        for folder in (reference.run, reference.cache)
        for path in folder.rglob("*")
        if path.is_file()
    ]
    # With a smaller limit the test's own log could not grow.
    limit = int(rng.integers(40_000, max(sizes)))
    refused(test, launcher.start(test.setup, place / "runs", place / "cache", file_limit=limit), f"limit {limit}")
    finish(test, launcher, reference, place)


def full_disk(test: FaultTest, launcher: Launcher, reference: Reference, place: Path, rng: np.random.Generator) -> None:
    needed = sum(
        path.stat().st_size
        for folder in (reference.run, reference.cache)
        for path in folder.rglob("*")
        if path.is_file()
    )
    size, disk = int(rng.uniform(0.1, 0.9) * needed), place / "disk"
    if not mount_tmpfs(disk, f"size={size}"):
        test.skipped = "no tmpfs may be mounted here"
        return
    try:
        launch = launcher.start(test.setup, disk / "runs", disk / "cache", log=place / "refused.log")
        refused(test, launch, f"tmpfs of {size}")
        mount_tmpfs(disk, f"size={20 * needed}")
        finish(test, launcher, reference, disk)
    finally:
        unmount(disk)


def damage(path: Path, rng: np.random.Generator) -> str:
    """Truncates or deletes a file, or flips one bit of it; returns what was done."""
    how = ("cut", "deleted", "flipped")[rng.integers(3)]
    data = bytearray(path.read_bytes())
    if how == "deleted":
        path.unlink()
    elif how == "cut":
        os.truncate(path, int(rng.integers(len(data))))
    else:
        data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        path.write_bytes(data)
    return f"{path.parent.name}/{path.name} {how}"


def _stopped(test: FaultTest, launcher: Launcher, place: Path, rng: np.random.Generator) -> None:
    """A run that was stopped after it had written two checkpoints or more."""
    # If the run ended before the signal came, start over: a finished run is not resumed. The signal comes two steps before the
    # end at the latest, so that this is rare on a busy machine too.
    for _ in range(5):
        if 0 not in stop_at(test, launcher, place, int(rng.integers(3, STEPS - 1)), signal.SIGTERM, rng).wait():
            break
        shutil.rmtree(place)
    else:
        raise AssertionError("five runs in a row ended before they were stopped")
    test.events.append(f"stopped at step {last_step(place / 'runs/run')}")


def checkpoint(
    test: FaultTest, launcher: Launcher, reference: Reference, place: Path, rng: np.random.Generator
) -> None:
    _stopped(test, launcher, place, rng)
    newest = max((place / "runs/run/checkpoints").glob("step-*"))
    if rng.integers(6) == 0:
        shutil.rmtree(newest)
        test.events.append(f"{newest.name} deleted")
    else:
        test.events.append(damage(newest / ("state.pt", "manifest.json")[rng.integers(2)], rng))
    finish(test, launcher, reference, place)


def shard(test: FaultTest, launcher: Launcher, reference: Reference, place: Path, rng: np.random.Generator) -> None:
    _stopped(test, launcher, place, rng)
    shards = sorted((place / "cache").glob("*/shard-*"))
    test.events.append(damage(shards[rng.integers(len(shards))], rng))
    # A row is verified when it is read. One that is damaged ends the run with a sentence, and is made again by the next.
    launch = launcher.start(test.setup, place / "runs", place / "cache")
    if any(launch.wait()):
        if "the cache file" not in launch.text() or "run the same command again" not in launch.text():
            test.wrong.append(f"damage to the cache was not reported: {launch.text()[-300:]}")
        test.events.append("refused once")
    finish(test, launcher, reference, place)


def two_runs(test: FaultTest, launcher: Launcher, reference: Reference, place: Path, rng: np.random.Generator) -> None:
    launches = {name: launcher.start(test.setup, place / "runs", place / "cache", name) for name in ("one", "other")}
    for name, launch in launches.items():
        if launch.wait() != [0] * test.setup.world:
            test.wrong.append(f"{name} failed: {launch.text()[-300:]}")
        else:
            test.wrong += differences(place / "runs" / name, reference.run)
    test.events.append("both at once")


def read_only(test: FaultTest, launcher: Launcher, reference: Reference, place: Path, rng: np.random.Generator) -> None:
    # Root ignores missing write permission, but not a file system that is mounted read-only.
    if not mount_tmpfs(place / "cache", "size=100m"):
        test.skipped = "no tmpfs may be mounted here"
        return
    try:
        shutil.copytree(reference.cache, place / "cache", dirs_exist_ok=True)
        assert mount_tmpfs(place / "cache", "ro") and not os.access(place / "cache", os.W_OK)
        test.events.append("read-only")
        finish(test, launcher, reference, place)
    finally:
        unmount(place / "cache")


FAULTS = {
    "killed": killed,
    "killed-writing": killed_writing,
    "sigterm": sigterm,
    "sigint": sigint,
    "file-limit": file_limit,
    "full-disk": full_disk,
    "checkpoint": checkpoint,
    "shard": shard,
    "two-runs": two_runs,
    "read-only": read_only,
}
