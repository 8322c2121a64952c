"""Lets single system calls of training runs fail (strace --inject), starts the same command again, and compares.

    make faults-io N=100
    python -m testing.io_faults --tests 100
    python -m testing.io_faults --only 37        # repeat one test

An uninterrupted run under strace says which calls change files in the run folder and the cache. Each test lets one of them
fail: the disk is full (ENOSPC) or broken (EIO). The run must go on, or end with status 2 and one sentence; its checkpoints must
be whole; and the same command without a fault must end with the run of an uninterrupted one. Linux only; without strace,
nothing is tested.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sushi_research.errors import UserError

TABLE = "io faults"  # the name of the table in its page
PARTS = ("runs/run", "cache")
NAMES = ("sd15-1-plain", "sdxl-1-plain")
SAMPLES = {
    "sample.enabled": True,
    "sample.prompts": ["a cat"],
    "sample.steps": 1,
    "sample.guidance": 1.0,
    "sample.every": 3,
}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m testing.io_faults",
        description="Lets single system calls of training runs fail.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--tests", type=int, default=100, help="number of tests (default: 100)")
    add("--only", type=int, metavar="TEST", help="run only the test with this number")
    add(
        "--keep",
        metavar="FOLDER",
        help="work in this folder and keep it (default: a temporary one, kept if something differs)",
    )
    add("--write", type=Path, metavar="PAGE", help="write the table between the marks in this page")
    found = parser.parse_args(arguments)
    if found.tests < len(NAMES):
        parser.error(f"--tests is at least {len(NAMES)}")
    if found.write and found.only is not None:
        parser.error("--write needs the results of all tests: leave --only out")
    return found


def main(options: argparse.Namespace) -> int:
    """Runs the command; returns the exit status."""
    from testing.result_pages import around_table, circumstances, write_table
    from testing.system_calls import Untraceable

    if options.write:
        around_table(options.write, TABLE)  # a page without marks is refused before the work, not after it
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    folder = Path(options.keep or tempfile.mkdtemp(prefix="io-faults-")).resolve()
    try:
        lines, status = all_faults(options, folder)
    except Untraceable as reason:
        if not options.keep:
            shutil.rmtree(folder)
        print(f"Skipped: {reason}. {circumstances()}")  # a table of another machine stays in the page
        return 0
    text = "\n".join(
        [*lines, "", circumstances(scripts=[f"scripts/train_{name.split('-')[0]}_lora.py" for name in NAMES])]
    )
    print(text)
    if options.write:
        write_table(options.write, TABLE, text)
    return status


def all_faults(options: argparse.Namespace, folder: Path) -> tuple[list[str], int]:
    """Runs the tests in `folder`; returns the lines of the table and the exit status. Raises Untraceable."""
    from testing.system_calls import choose, find_strace

    find_strace()
    from testing.faults import FaultTest, report_wrong, run_tests
    from testing.launches import Launcher

    folder.mkdir(parents=True, exist_ok=True)
    launcher, references, faults, setups = Launcher(folder), {}, [], sampling_setups()
    for number, setup in enumerate(setups):
        references[setup.name], calls = logged_run(launcher, setup, folder / "reference" / setup.name)
        share = len(range(number, options.tests, len(setups)))
        faults += [(setup, fault) for fault in choose(calls, share, number / len(setups))]
    tests = [FaultTest(number, f"{fault.name}, {fault.error}", setup) for number, (setup, fault) in enumerate(faults)]
    if options.only is not None:
        if options.only not in range(len(tests)):
            raise UserError(f"--only {options.only}: there are tests 0 to {len(tests) - 1}.")
        tests = [tests[options.only]]

    def inject(test: FaultTest, place: Path) -> None:
        one_fault(test, faults[test.number][1], launcher, references[test.setup.name], place)

    run_tests(tests, inject, folder)
    return table(tests), report_wrong(tests, folder, keep=bool(options.keep))


def sampling_setups() -> list[Any]:
    """The setups of `NAMES`, with sample images."""
    from testing.launches import SETUPS, Setup

    class WithSamples(Setup):
        @property
        def settings(self) -> dict[str, Any]:
            return super().settings | SAMPLES

    return [
        WithSamples(*(getattr(SETUPS[name], field) for field in ("architecture", "world", "harsh"))) for name in NAMES
    ]


def logged_run(launcher: Any, setup: Any, place: Path) -> tuple[Any, list[Any]]:
    """Makes the uninterrupted run under strace; returns it with its calls. Raises Untraceable."""
    from testing.faults import Reference
    from testing.system_calls import attach, log_options, read_log

    launch = launcher.start(setup, place / "runs", place / "cache", traced=True)
    pid = launch.processes[0].pid
    try:
        strace = attach(pid, place / "calls", *log_options())
    except BaseException:
        launch.kill()
        raise
    assert launch.wait() == [0], f"the uninterrupted run failed: {launch.text()[-2000:]}"
    strace.wait()
    calls = read_log((place / "calls").read_text(errors="replace"), place, PARTS)
    # A cache puts the id of the process into temporary names.
    calls = [replace(call, path=call.path.replace(f"-{pid}-", "-PID-")) for call in calls]
    return Reference(place / "runs/run", place / "cache", seconds=0.0, writes=len(calls)), calls


def one_fault(test: Any, fault: Any, launcher: Any, reference: Any, place: Path) -> None:
    """Injects `fault` into a new run, checks how it ends and its checkpoints, and finishes it without a fault."""
    from testing.faults import finish, refused
    from testing.system_calls import attach, fault_options

    launch = launcher.start(test.setup, place / "runs", place / "cache", traced=True)
    pid = launch.processes[0].pid
    fault = replace(fault, path=fault.path.replace("-PID-", f"-{pid}-"))
    strace = attach(pid, place / "calls", *fault_options(fault, place))
    refused(test, launch, str(fault))
    strace.wait()
    if "(INJECTED)" not in (place / "calls").read_text(errors="replace"):
        test.wrong.append("the call did not come again, so nothing failed")
        return
    test.wrong += damaged_checkpoints(place / "runs/run", test.setup)
    said = launch.text()
    finish(test, launcher, reference, place)
    if test.status == 0:
        # A picture that could not be written is not drawn again, but the run says so.
        test.wrong = [
            what for what in test.wrong if not (what.startswith("run: samples") and "warning" in said.lower())
        ]


def damaged_checkpoints(run: Path, setup: Any) -> list[str]:
    """What is wrong with the checkpoints of a run: one is damaged, or the last one before the last logged step is missing."""
    from sushi_research.runs.checkpoint import DamagedCheckpoint, read_checkpoint
    from testing.launches import last_step

    found, steps = [], [0]
    for path in sorted(run.glob("checkpoints/step-*")):
        try:
            steps.append(read_checkpoint(path).step)
        except DamagedCheckpoint as damage:
            found.append(f"{path.name} is damaged: {damage}")
    every = setup.settings["checkpoint.every"]
    if max(steps) < (expected := max(0, last_step(run) - 1) // every * every):
        found.append(f"the checkpoint of step {expected} is gone")
    return found


def table(tests: Sequence[Any]) -> list[str]:
    """The lines of a Markdown table: how the runs with a fault ended, by call and error."""
    from testing.result_pages import markdown

    rows = []
    for kind in [*dict.fromkeys(sorted(test.kind for test in tests)), "all"]:
        some = [test for test in tests if kind in (test.kind, "all")]
        counts = [sum(test.status == status and not test.wrong for test in some) for status in (0, 2)]
        rows.append([kind, len(some), *counts, sum(bool(test.wrong) for test in some)])
    return markdown(["system call, error", "tests", "exit 0", "exit 2", "failures"], rows)


if __name__ == "__main__":
    from sushi_research.config.process import run_main

    run_main(main, parse(sys.argv[1:]))
