"""Kills and harms runs of the real training scripts, starts the same command again, and compares with the uninterrupted run.

    make drill N=100
    python -m testing.fault_injection --trials 100                   # every kind of fault in every setup, in turn
    python -m testing.fault_injection --kind killed --trials 20      # one kind
    python -m testing.fault_injection --only 37                      # one trial again, as it was

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
import tempfile
import time
from pathlib import Path

from sushi_research import randomness
from sushi_research.config.command_line import run_main
from sushi_research.errors import UserError
from sushi_research.progress import progress
from sushi_research.runs import provenance
from testing.faults import FAULTS, Reference, Trial
from testing.launches import SETUPS, STEPS, Setup, Stage

assert list(FAULTS) == list(KINDS)


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
        trial = Trial(number, kind, setups[sum(divmod(number, len(kinds))) % len(setups)])
        if trial.setup.name not in references:
            references[trial.setup.name] = make_reference(stage, trial.setup, folder / "reference" / trial.setup.name)
        trials.append(trial)
        place = folder / f"trial-{number:03d}"
        rng = randomness.key(arguments.seed, "fault-drill", number)
        try:
            FAULTS[kind](trial, stage, references[trial.setup.name], place, rng)
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

    from sushi_research.runs.checkpoint import latest_checkpoint

    checkpoint = latest_checkpoint(run / "checkpoints")
    assert checkpoint.facts["world"] == setup.world and checkpoint.step == STEPS
    # bitsandbytes keeps its states one level further down than torch.
    states = [
        state.get("__bnb_optimizer_quant_state__", state) for state in checkpoint.load()["optimizer"]["state"].values()
    ]
    in_8_bits = any(getattr(value, "dtype", None) == torch.uint8 for state in states for value in state.values())
    assert in_8_bits is setup.harsh, "the optimizer's states are not what the setup says"


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
