"""Kills or damages runs of the real training scripts, starts the same command again, and compares with an uninterrupted run.

    make chaos N=100
    python -m testing.fault_injection --tests 100                   # all kinds of faults and all setups in turn
    python -m testing.fault_injection --kind killed --tests 20      # one kind
    python -m testing.fault_injection --only 37                      # repeat one test

The adapter, metrics (but speed, memory), evaluated losses and last checkpoint must be equal bit for bit. Prints a table; the exit
status is 1 if anything differs. Linux only. A full or read-only disk is a tmpfs, which only root may mount.
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
    """Parses the command line before any heavy import, so that --help answers at once."""
    parser = argparse.ArgumentParser(
        description="Kills or damages runs, resumes them, and compares them with uninterrupted ones.",
        epilog="kinds: " + "; ".join(f"{name}: {what}" for name, what in KINDS.items()) + ".",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--tests", type=int, default=100, help="number of tests (default: 100); kinds and setups take turns")
    add("--seed", type=int, default=0, help="seed of the random choices in a test (default: 0)")
    add("--kind", action="append", choices=KINDS, help="kind of fault; repeatable; default: all")
    add("--setup", action="append", help="sd15-1, sdxl-2, sd15-1-plain and so on; repeatable; default: all")
    add("--only", type=int, metavar="TEST", help="run only the test with this number")
    add(
        "--keep",
        metavar="FOLDER",
        help="work in this folder and keep it (default: a temporary folder, kept only if something differs)",
    )
    add("--output", metavar="FILE", help="also write the table to this file")
    found = parser.parse_args(arguments)
    if found.tests < 1:
        parser.error("--tests is at least 1")
    return found


if __name__ == "__main__":
    ARGUMENTS = parse(sys.argv[1:])

import os
import tempfile
import time
from pathlib import Path

from sushi_research import randomness
from sushi_research.config.process import run_main
from sushi_research.errors import UserError
from testing.faults import FAULTS, FaultTest, Reference, report_wrong, run_tests
from testing.launches import SETUPS, STEPS, Launcher, Setup
from testing.result_pages import circumstances

assert list(FAULTS) == list(KINDS)


def main(arguments: argparse.Namespace) -> int:
    """Runs the tests and prints the table; returns 1 if anything differs."""
    unknown = [name for name in arguments.setup or [] if name not in SETUPS]
    if unknown:
        raise UserError(f"--setup {unknown[0]} is unknown: choose from {', '.join(SETUPS)}.")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    folder = Path(arguments.keep or tempfile.mkdtemp(prefix="fault-injection-")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    launcher, references = Launcher(folder), {}
    kinds, setups = arguments.kind or list(KINDS), [SETUPS[name] for name in arguments.setup or SETUPS]
    numbers = range(arguments.tests) if arguments.only is None else [arguments.only]
    # Each kind goes through the setups in turn.
    tests = [
        FaultTest(number, kinds[number % len(kinds)], setups[sum(divmod(number, len(kinds))) % len(setups)])
        for number in numbers
    ]

    def inject(test: FaultTest, place: Path) -> None:
        name = test.setup.name
        if name not in references:
            references[name] = make_reference(launcher, test.setup, folder / "reference" / name)
        rng = randomness.key(arguments.seed, "fault-injection", test.number)
        FAULTS[test.kind](test, launcher, references[name], place, rng)

    run_tests(tests, inject, folder)
    text = table(tests)
    print(text)
    if arguments.output:
        Path(arguments.output).write_text(text + "\n")
    return report_wrong(tests, folder, keep=bool(arguments.keep))


def make_reference(launcher: Launcher, setup: Setup, place: Path) -> Reference:
    """Makes the uninterrupted run and checks that it has the properties of the setup."""
    started = time.monotonic()
    launch = launcher.start(setup, place / "runs", place / "cache", count=place / "writes")
    assert launch.wait() == [0] * setup.world, f"the uninterrupted run failed: {launch.text()[-2000:]}"
    seconds, run = time.monotonic() - started, place / "runs" / "run"
    require_setup(run, setup)
    return Reference(run, place / "cache", seconds, int((place / "writes").read_text()))


def require_setup(run: Path, setup: Setup) -> None:
    """Asserts that the run had the setup's number of processes, all steps, and 8-bit optimizer states if asked for."""
    import torch

    from sushi_research.runs.checkpoint import latest_checkpoint

    checkpoint = latest_checkpoint(run / "checkpoints")
    assert checkpoint.facts["world"] == setup.world and checkpoint.step == STEPS
    # bitsandbytes nests its states one level deeper than torch.
    states = [
        state.get("__bnb_optimizer_quant_state__", state)
        for state in checkpoint.load()["optimizer"]["tensors"].values()
    ]
    in_8_bits = any(getattr(value, "dtype", None) == torch.uint8 for state in states for value in state.values())
    assert in_8_bits is setup.harsh, "the optimizer states have not the dtype of the setup"


def table(tests: Sequence[FaultTest]) -> str:
    """A Markdown table: kinds as rows, setups as columns, "equal of all" in the cells; notes below."""
    setups = [name for name in SETUPS if any(test.setup.name == name for test in tests)]
    lines = ["| fault | " + " | ".join(setups) + " | all |", "|---|" + "---:|" * (len(setups) + 1)]
    for kind in KINDS:
        of_kind = [test for test in tests if test.kind == kind]
        if of_kind:
            cells = [_cell([test for test in of_kind if test.setup.name == name]) for name in setups]
            lines.append(f"| {kind}: {KINDS[kind]} | {' | '.join(cells)} | {_cell(of_kind)} |")
    columns = [_cell([test for test in tests if test.setup.name == name]) for name in setups]
    lines.append(f"| all | {' | '.join(columns)} | {_cell(tests)} |")
    note = f"Equal bit for bit, of tests done. {circumstances(('torch', 'diffusers', 'peft', 'bitsandbytes'))}"
    kills = [event for test in tests for event in test.events if event.startswith("killed")]
    steps = [int(event.partition("step ")[2].split()[0].rstrip(",")) for event in kills]
    if steps:
        early = sum(step < 2 for step in steps)
        inside = sum("(" in event and "between files" not in event for event in kills)
        note += f" {len(kills)} kills: {early} before the first checkpoint, {inside} with a file half written."
    skipped = sorted({test.skipped for test in tests if test.skipped})
    return "\n".join([*lines, "", note, *(f"Skipped: {reason}." for reason in skipped)])


def _cell(tests: Sequence[FaultTest]) -> str:
    done = [test for test in tests if not test.skipped]
    return f"{sum(not test.wrong for test in done)} of {len(done)}" if done else "-"


if __name__ == "__main__":
    run_main(main, ARGUMENTS)
