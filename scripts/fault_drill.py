"""Kills and harms runs of the real training scripts, starts the same command again, and compares with the uninterrupted run.

    make drill N=100
    python scripts/fault_drill.py --trials 100                   # every kind of fault in every setup, in turn
    python scripts/fault_drill.py --kind killed --trials 20      # one kind
    python scripts/fault_drill.py --only 37                      # one trial again, as it was

Adapter, every logged value, every evaluated loss and the last checkpoint must be equal bit for bit. Ends with a table; exit status
1 where anything differs. Linux; a full disk and a read-only one are a tmpfs, which only root may mount.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

KINDS = {
    "killed": "SIGKILL at a random moment, one to three times",
    "killed-writing": "SIGKILL right before a sync or rename of a file: checkpoint, cache, results, adapter",
    "sigterm": "SIGTERM at a random moment of the training",
    "sigint": "SIGINT at a random moment of the training",
    "file-limit": "no file may grow beyond a random size, then it may",
    "full-disk": "a tmpfs of a random size for run and cache, then a larger one",
    "checkpoint": "stopped; the newest checkpoint cut, deleted, or one bit of it flipped",
    "shard": "stopped; a shard of a cache cut, deleted, or one bit of it flipped",
    "two-runs": "two runs at once on one empty cache",
    "read-only": "a cache that is full and read-only",
}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line. Light: --help waits for nothing."""
    parser = argparse.ArgumentParser(
        description="Kills and harms runs, continues them, and compares with the uninterrupted ones.",
        epilog="kinds: " + "; ".join(f"{name}: {what}" for name, what in KINDS.items()) + ".",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--trials", type=int, default=100, help="how many (default: 100); kinds and setups take turns")
    add("--seed", type=int, default=0, help="of what is random in a trial (default: 0)")
    add("--kind", action="append", choices=KINDS, help="repeatable; default: all")
    add("--setup", action="append", help="repeatable: sd15-1, sdxl-2, sd15-1-plain and so on; default: all")
    add("--only", type=int, metavar="TRIAL", help="this trial alone, by its number")
    add(
        "--keep",
        metavar="FOLDER",
        help="work there and keep it (default: a temporary folder, kept where something differs)",
    )
    add("--output", metavar="FILE", help="write the table there too")
    found = parser.parse_args(arguments)
    if found.trials < 1:
        parser.error("--trials is at least 1")
    return found


if __name__ == "__main__":
    ARGUMENTS = parse(sys.argv[1:])

import os
import shutil
import signal
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sushi_research import provenance, randomness
from sushi_research.command_line import run_main
from sushi_research.drill_stage import SETUPS, STEPS, Launch, Setup, Stage, last_step, mount_tmpfs, unmount
from sushi_research.errors import UserError
from sushi_research.progress import progress
from sushi_research.run_equality import differences


@dataclass
class Reference:
    """The uninterrupted run of a setup: its folder and cache, how long it took, how often it synced and renamed."""

    run: Path
    cache: Path
    seconds: float
    writes: int


@dataclass
class Trial:
    """What was done in a trial, in words, and what differs from the reference; `skipped`: why it could not be done."""

    number: int
    kind: str
    setup: Setup
    events: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    skipped: str = ""


def main(arguments: argparse.Namespace) -> int:
    """Runs the trials and prints the table; returns 1 where anything differs."""
    unknown = [name for name in arguments.setup or [] if name not in SETUPS]
    if unknown:
        raise UserError(f"--setup {unknown[0]} is unknown: choose from {', '.join(SETUPS)}.")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    folder = Path(arguments.keep or tempfile.mkdtemp(prefix="fault-drill-")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    stage, references = Stage(folder), {}
    kinds, setups = arguments.kind or list(KINDS), [SETUPS[name] for name in arguments.setup or SETUPS]
    numbers = range(arguments.trials) if arguments.only is None else [arguments.only]
    trials = []
    for number in progress(numbers, description="drilling", unit="trial"):
        kind = kinds[number % len(kinds)]
        # A kind meets the setups in turn.
        trial = Trial(number, kind, setups[(number // len(kinds) + number) % len(setups)])
        if trial.setup.name not in references:
            references[trial.setup.name] = make_reference(stage, trial.setup, folder / "reference" / trial.setup.name)
        trials.append(trial)
        place = folder / f"trial-{number:03d}"
        rng = randomness.key(arguments.seed, "fault-drill", number)
        try:
            ACTIONS[kind](trial, stage, references[trial.setup.name], place, rng)
        except (TimeoutError, AssertionError) as error:
            trial.wrong.append(f"{type(error).__name__}: {error}")
        if not trial.wrong:
            shutil.rmtree(place, ignore_errors=True)
    text = table(trials)
    print(text)
    if arguments.output:
        Path(arguments.output).write_text(text + "\n")
    wrong = [trial for trial in trials if trial.wrong]
    for trial in wrong:
        print(f"trial {trial.number} ({trial.kind}, {trial.setup.name}): {'; '.join(trial.events)}", file=sys.stderr)
        print(f"  differs: {'; '.join(trial.wrong[:3])}", file=sys.stderr)
    if wrong:
        print(f"{len(wrong)} of {len(trials)} trials differ; all of it is in {folder}", file=sys.stderr)
    elif not arguments.keep:
        shutil.rmtree(folder)
    return int(bool(wrong))


def make_reference(stage: Stage, setup: Setup, place: Path) -> Reference:
    """The uninterrupted run; checks that it is what the setup says."""
    began = time.monotonic()
    launch = stage.start(setup, place / "runs", place / "cache", count=place / "writes")
    assert launch.wait() == [0] * setup.world, f"the uninterrupted run failed: {launch.text()[-2000:]}"
    seconds, run = time.monotonic() - began, place / "runs" / "run"
    require_as_told(run, setup)
    return Reference(run, place / "cache", seconds, int((place / "writes").read_text()))


def require_as_told(run: Path, setup: Setup) -> None:
    """AssertionError unless the run had that many processes, the steps, and states in 8 bits where they are asked for."""
    import torch

    from sushi_research.checkpoint import latest_checkpoint

    checkpoint = latest_checkpoint(run / "checkpoints")
    assert checkpoint.facts["world"] == setup.world and checkpoint.step == STEPS
    # bitsandbytes keeps its states one level further down than torch.
    states = [
        state.get("__bnb_optimizer_quant_state__", state) for state in checkpoint.load()["optimizer"]["state"].values()
    ]
    in_8_bits = any(getattr(value, "dtype", None) == torch.uint8 for state in states for value in state.values())
    assert in_8_bits is setup.harsh, "the optimizer's states are not what the setup says"


def finish(trial: Trial, stage: Stage, reference: Reference, place: Path, name: str = "run") -> None:
    """Starts the command again, undisturbed, and compares."""
    launch = stage.start(trial.setup, place / "runs", place / "cache", name)
    statuses = launch.wait()
    if statuses != [0] * trial.setup.world:
        trial.wrong.append(f"the command again ended with {statuses}: {launch.text()[-300:]}")
        return
    trial.wrong += differences(place / "runs" / name, reference.run)


def killed(trial: Trial, stage: Stage, reference: Reference, place: Path, rng: np.random.Generator) -> None:
    for _ in range(rng.integers(1, 4)):
        launch = stage.start(trial.setup, place / "runs", place / "cache")
        time.sleep(rng.uniform(0.05, 1.0) * reference.seconds)
        launch.kill(int(rng.integers(trial.setup.world)))
        trial.events.append(f"killed at step {last_step(place / 'runs/run')}")
    finish(trial, stage, reference, place)


def killed_writing(trial: Trial, stage: Stage, reference: Reference, place: Path, rng: np.random.Generator) -> None:
    for _ in range(rng.integers(1, 4)):
        count = int(rng.integers(1, reference.writes + 1))
        launch = stage.start(trial.setup, place / "runs", place / "cache", die_at=count)
        statuses = launch.wait()
        left = [
            path.name for path in place.rglob(".*") if path.name.endswith(".tmp") or path.name.startswith(".writing")
        ]
        what = left[0].split(".")[1] if left else "between files"
        trial.events.append(
            f"killed before write {count} at step {last_step(place / 'runs/run')} ({what}), {statuses[0]}"
        )
    finish(trial, stage, reference, place)


def _signalled(
    number: int, trial: Trial, stage: Stage, reference: Reference, place: Path, rng: np.random.Generator
) -> None:
    launch = stop_at(trial, stage, place, int(rng.integers(1, STEPS)), number, rng)
    statuses = set(launch.wait())
    # Within a step it goes on to the step's end; one that had just ended its last step is simply done.
    if not statuses <= {128 + number, 128 + signal.SIGTERM, 0}:
        trial.wrong.append(f"stopped with {statuses}: {launch.text()[-300:]}")
    trial.events.append(f"stopped at step {last_step(place / 'runs/run')}")
    finish(trial, stage, reference, place)


def stop_at(trial: Trial, stage: Stage, place: Path, step: int, number: int, rng: np.random.Generator) -> Launch:
    """A launch to which a signal was sent when it had logged a step, to one of its processes."""
    launch = stage.start(trial.setup, place / "runs", place / "cache")
    while last_step(place / "runs/run") < step and all(process.is_alive() for process in launch.processes):
        time.sleep(0.005)
    process = launch.processes[int(rng.integers(trial.setup.world))]
    if process.is_alive():
        os.kill(process.pid, number)
    return launch


def sigterm(*arguments: object) -> None:
    _signalled(signal.SIGTERM, *arguments)


def sigint(*arguments: object) -> None:
    _signalled(signal.SIGINT, *arguments)


def refused(trial: Trial, launch: Launch, what: str) -> None:
    """What a run that the disk refuses must say: one sentence, status 2, no traceback."""
    status, text = launch.wait()[0], launch.text()
    sentences = [line for line in text.splitlines() if line.startswith("error: ")]
    trial.events.append(f"{what}: status {status}{f', {sentences[0][:70]}' if sentences else ''}")
    if status == 0:
        return
    if status != 2 or len(sentences) != 1 or ("Traceback" in text and trial.setup.world == 1):
        trial.wrong.append(f"{what} ended with {status} and said {text[-400:]!r}")


def file_limit(trial: Trial, stage: Stage, reference: Reference, place: Path, rng: np.random.Generator) -> None:
    sizes = [
        path.stat().st_size
        for folder in (reference.run, reference.cache)
        for path in folder.rglob("*")
        if path.is_file()
    ]
    # Below it the log itself could not grow, which is no disk's fault.
    limit = int(rng.integers(40_000, max(sizes)))
    refused(trial, stage.start(trial.setup, place / "runs", place / "cache", file_limit=limit), f"limit {limit}")
    finish(trial, stage, reference, place)


def full_disk(trial: Trial, stage: Stage, reference: Reference, place: Path, rng: np.random.Generator) -> None:
    needed = sum(
        path.stat().st_size
        for folder in (reference.run, reference.cache)
        for path in folder.rglob("*")
        if path.is_file()
    )
    size, disk = int(rng.uniform(0.1, 0.9) * needed), place / "disk"
    if not mount_tmpfs(disk, f"size={size}"):
        trial.skipped = "no tmpfs may be mounted here"
        return
    try:
        launch = stage.start(trial.setup, disk / "runs", disk / "cache", log=place / "refused.log")
        refused(trial, launch, f"tmpfs of {size}")
        mount_tmpfs(disk, f"size={20 * needed}")
        finish(trial, stage, reference, disk)
    finally:
        unmount(disk)


def damage(path: Path, rng: np.random.Generator) -> str:
    """Cuts or deletes a file, or flips one bit of it; says which."""
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


def _stopped(trial: Trial, stage: Stage, place: Path, rng: np.random.Generator) -> None:
    """A run that was stopped when it had two checkpoints or more."""
    # A run that had come to its end before the signal did is begun anew: what is done is not continued.
    while 0 in stop_at(trial, stage, place, int(rng.integers(3, STEPS)), signal.SIGTERM, rng).wait():
        shutil.rmtree(place)
    trial.events.append(f"stopped at step {last_step(place / 'runs/run')}")


def checkpoint(trial: Trial, stage: Stage, reference: Reference, place: Path, rng: np.random.Generator) -> None:
    _stopped(trial, stage, place, rng)
    newest = max((place / "runs/run/checkpoints").glob("step-*"))
    if rng.integers(6) == 0:
        shutil.rmtree(newest)
        trial.events.append(f"{newest.name} deleted")
    else:
        trial.events.append(damage(newest / ("state.pt", "manifest.json")[rng.integers(2)], rng))
    finish(trial, stage, reference, place)


def shard(trial: Trial, stage: Stage, reference: Reference, place: Path, rng: np.random.Generator) -> None:
    _stopped(trial, stage, place, rng)
    shards = sorted((place / "cache").glob("*/shard-*"))
    trial.events.append(damage(shards[rng.integers(len(shards))], rng))
    finish(trial, stage, reference, place)


def two_runs(trial: Trial, stage: Stage, reference: Reference, place: Path, rng: np.random.Generator) -> None:
    launches = {name: stage.start(trial.setup, place / "runs", place / "cache", name) for name in ("one", "other")}
    for name, launch in launches.items():
        if launch.wait() != [0] * trial.setup.world:
            trial.wrong.append(f"{name} failed: {launch.text()[-300:]}")
        else:
            trial.wrong += differences(place / "runs" / name, reference.run)
    trial.events.append("both at once")


def read_only(trial: Trial, stage: Stage, reference: Reference, place: Path, rng: np.random.Generator) -> None:
    # To root a file without write permission is none: a file system that is mounted read-only is.
    if not mount_tmpfs(place / "cache", "size=100m"):
        trial.skipped = "no tmpfs may be mounted here"
        return
    try:
        shutil.copytree(reference.cache, place / "cache", dirs_exist_ok=True)
        assert mount_tmpfs(place / "cache", "ro") and not os.access(place / "cache", os.W_OK)
        trial.events.append("read-only")
        finish(trial, stage, reference, place)
    finally:
        unmount(place / "cache")


ACTIONS = {
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
assert list(ACTIONS) == list(KINDS)


def table(trials: Sequence[Trial]) -> str:
    """Markdown: kinds as rows, setups as columns, "equal of all" in the cells, and what was done beneath."""
    setups = [name for name in SETUPS if any(trial.setup.name == name for trial in trials)]
    lines = ["| fault | " + " | ".join(setups) + " | all |", "|---|" + "---:|" * (len(setups) + 1)]
    for kind in KINDS:
        of_kind = [trial for trial in trials if trial.kind == kind]
        if of_kind:
            cells = [_cell([trial for trial in of_kind if trial.setup.name == name]) for name in setups]
            lines.append(f"| {kind}: {KINDS[kind]} | {' | '.join(cells)} | {_cell(of_kind)} |")
    columns = [_cell([trial for trial in trials if trial.setup.name == name]) for name in setups]
    lines.append(f"| all | {' | '.join(columns)} | {_cell(trials)} |")
    libraries = provenance.library_versions()
    versions = ", ".join(f"{name} {libraries[name]}" for name in ("torch", "diffusers", "peft", "bitsandbytes"))
    date = time.strftime("%Y-%m-%d", time.gmtime())
    note = f"Equal bit for bit, of trials done. {os.cpu_count()} CPU cores, {versions}, {date}."
    kills = [event for trial in trials for event in trial.events if event.startswith("killed")]
    steps = [int(event.partition("step ")[2].split()[0].rstrip(",")) for event in kills]
    if steps:
        early = sum(step < 2 for step in steps)
        inside = sum("(" in event and "between files" not in event for event in kills)
        note += f" {len(kills)} kills: {early} before the first checkpoint, {inside} with a file half written."
    skipped = sorted({trial.skipped for trial in trials if trial.skipped})
    return "\n".join([*lines, "", note, *(f"Left out: {reason}." for reason in skipped)])


def _cell(trials: Sequence[Trial]) -> str:
    done = [trial for trial in trials if not trial.skipped]
    return f"{sum(not trial.wrong for trial in done)} of {len(done)}" if done else "-"


if __name__ == "__main__":
    run_main(main, ARGUMENTS)
