"""Inserts the faults of mutants.yaml one at a time and runs the tests that should catch them.

    make mutants
    python -m testing.mutants --list
    python -m testing.mutants --only alpha_dropped noise_reused
    python -m testing.mutants --baseline --write docs/testing.md

Every fault gets a fresh copy of the working tree (tracked and new files in their current state) in a temporary folder. It is
caught when a test fails there. A test file that cannot be imported, a missing test, or tests that take too long count as an
error, not as a catch. Exit status: 0 if all faults were caught, 1 if not, 2 for a mistake in the list or the command.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, fields
from pathlib import Path

import yaml

from sushi_research.config.process import run_main
from sushi_research.errors import UserError, nearest
from sushi_research.progress import progress
from testing.result_pages import around_table, write_table

ROOT = Path(__file__).parents[1]
LIST = ROOT / "testing/mutants.yaml"
TABLE = "mutants"  # the name of the table in its page
# Timeouts in seconds: for the tests of one fault, and for all tests on the clean copy.
PATIENCE, BASELINE_PATIENCE = 600, 3600
BASELINE = "clean copy"
# Matches pytest's summary. A test has `::` in its name; a file that cannot be imported does not.
_FAILED = re.compile(r"^(?:FAILED|ERROR) (.+?::.+?)(?: - .*)?$", re.MULTILINE)


@dataclass(frozen=True)
class Mutant:
    """One fault: `old` occurs exactly once in `file` and is replaced by `new`. `tests`: test files or ids, at least one."""

    name: str
    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """`word`: caught, survived, error, or, for the clean copy, passed or failed. `detail`: the test that failed, or the error."""

    name: str
    word: str
    detail: str
    seconds: float


def read_mutants(path: Path, root: Path) -> list[Mutant]:
    """Reads the list at `path`. UserError if an entry is incomplete or does not match the files below `root`."""
    names = [field.name for field in fields(Mutant)]
    mutants = []
    for number, entry in enumerate(yaml.safe_load(path.read_text(encoding="utf-8")) or [], 1):
        if not isinstance(entry, dict) or sorted(entry) != sorted(names) or not entry["tests"]:
            raise UserError(f"{path.name}: entry {number} does not have {', '.join(names)}: correct it.")
        mutants.append(Mutant(**{**entry, "tests": tuple(entry["tests"])}))
    seen: set[str] = set()
    for mutant in mutants:
        if mutant.name in seen:
            raise UserError(f"{path.name} has two entries called {mutant.name}: rename one.")
        seen.add(mutant.name)
        planted(mutant, root)
        for test in mutant.tests:
            if not (root / test.partition("::")[0]).is_file():
                raise UserError(f"{path.name}: {mutant.name} names {test}, and there is no such test file: correct it.")
    return mutants


def planted(mutant: Mutant, root: Path) -> str:
    """The text of the mutant's file with the fault. UserError if `old` does not occur in the file exactly once."""
    path = root / mutant.file
    if not path.is_file():
        raise UserError(f"the fault {mutant.name} belongs in {mutant.file}, which does not exist: correct its path.")
    text = path.read_text(encoding="utf-8")
    count = text.count(mutant.old)
    if count != 1:
        raise UserError(
            f"the fault {mutant.name} replaces a text that occurs {count} times in {mutant.file}, not once: correct it."
        )
    changed = text.replace(mutant.old, mutant.new)
    try:
        ast.parse(changed)
    except SyntaxError as error:
        raise UserError(f"the fault {mutant.name} makes {mutant.file} no Python ({error}): correct it.") from None
    return changed


def copy_tree(root: Path, target: Path) -> None:
    """Copies the files of the working tree `root` that git does not ignore into the folder `target`."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        names = subprocess.run(command, cwd=root, capture_output=True, check=True).stdout.decode().split("\0")
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"git cannot list the files of {root} ({error}): run this in a git checkout.") from error
    for name in names:
        if (root / name).is_file():  # a tracked file that was removed is still listed
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / name, target / name)


class Runner:
    """Runs tests on copies of the working tree `root`, each in its own process group, which is killed afterwards."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopped = False

    def stop(self) -> None:
        """Kills running tests and starts no new ones."""
        self._stopped = True
        for process in list(self._running):
            _kill_group(process)

    def check(self, name: str, mutant: Mutant | None, tests: Sequence[str]) -> Outcome:
        """The outcome of `tests` on a fresh copy with the fault `mutant`; None is the clean copy."""
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="mutant-", ignore_cleanup_errors=True) as temporary:
            folder = Path(temporary).resolve()
            copy_tree(self.root, folder / "copy")
            if mutant is not None:
                (folder / "copy" / mutant.file).write_text(planted(mutant, folder / "copy"), encoding="utf-8")
            word, detail = self._pytest(folder, tests, PATIENCE if mutant else BASELINE_PATIENCE)
        if mutant is None:
            word = {"survived": "passed", "caught": "failed"}.get(word, word)
        return Outcome(name, word, detail, time.monotonic() - started)

    def _pytest(self, folder: Path, tests: Sequence[str], patience: float) -> tuple[str, str]:
        """Runs pytest in `folder/copy`; its temporary files are in `folder` too, and are deleted with it."""
        (folder / "tmp").mkdir()
        # PYTHONPATH takes precedence over the installed package, also in processes that the tests launch.
        places = {"PYTHONPATH": str(folder / "copy"), "TMPDIR": str(folder / "tmp")}
        options = {"cwd": folder / "copy", "env": os.environ | places | {"OMP_NUM_THREADS": "1"}}
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
        with open(folder / "output", "w+", encoding="utf-8", errors="replace") as output:
            streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
            process = subprocess.Popen(command, **options, **streams, start_new_session=True)
            self._running.add(process)
            try:
                process.wait(0 if self._stopped else patience)
            except subprocess.TimeoutExpired:
                return "error", f"not done after {patience:g} seconds"
            finally:
                _kill_group(process)
                process.wait()
                self._running.discard(process)
            output.seek(0)
            return interpret(process.returncode, output.read())


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kills the process and its remaining children."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def interpret(status: int, output: str) -> tuple[str, str]:
    """Interprets pytest's exit status and output: (caught, the test), (survived, "") or (error, the reason)."""
    if status == 0:
        return "survived", ""
    failed = _FAILED.search(output)
    if status == 1 and failed:
        return "caught", failed[1]
    lines = [line for line in output.splitlines() if line.strip()]
    return "error", f"pytest ended with status {status}: {lines[-1].strip('= ')[:200] if lines else 'no output'}"


def table(mutants: Sequence[Mutant], outcomes: Sequence[Outcome], path: Path) -> str:
    """The results as a Markdown table in the order of the list, and the hash of that list."""
    found = {outcome.name: outcome for outcome in outcomes}
    lines = ["| name | place | what | caught by | seconds |", "|---|---|---|---|---:|"]
    for mutant in mutants:
        outcome = found[mutant.name]
        test = outcome.detail.partition("[")[0]  # the values of its parameters can be long
        by = f"`{test}`" if outcome.word == "caught" else f"**{outcome.word}** {outcome.detail}".strip()
        cells = [mutant.name, f"`{mutant.file}`", mutant.what, by, f"{outcome.seconds:.0f}"]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return "\n".join([*lines, "", f"{summary(outcomes)} SHA-256 of `testing/{path.name}`: `{digest}`."])


def summary(outcomes: Sequence[Outcome]) -> str:
    """One line that says how many faults were caught."""
    faults = [outcome for outcome in outcomes if outcome.name != BASELINE]
    caught = sum(outcome.word == "caught" for outcome in faults)
    others = [f"{outcome.name} ({outcome.word})" for outcome in outcomes if outcome.word not in ("caught", "passed")]
    return f"{caught} of {len(faults)} faults caught" + (f"; not as expected: {', '.join(others)}." if others else ".")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m testing.mutants", description="Inserts small faults and runs the tests that should catch them."
    )
    add = parser.add_argument
    add("--only", nargs="+", metavar="NAME", help="test only these faults")
    add("--jobs", type=int, default=2, help="number of faults tested in parallel (default: 2)")
    add("--list", action="store_true", help="check and print the list, and run no tests")
    add("--baseline", action="store_true", help="also run all the tests on a clean copy")
    add("--write", type=Path, metavar="FILE", help="write the table between the marks in this page")
    found = parser.parse_args(arguments)
    if found.jobs < 1:
        parser.error("--jobs is at least 1")
    if found.write and (found.only or found.list):
        parser.error("--write needs the results of all faults: leave --only and --list out")
    return found


def main(arguments: Sequence[str]) -> int:
    """Runs the command; returns the exit status."""
    options = parse(arguments)
    mutants = read_mutants(LIST, ROOT)
    known = [mutant.name for mutant in mutants]
    for name in options.only or []:
        if name not in known:
            raise UserError(f"no fault is called {name}{nearest(name, known)}: --list names them all.")
    mutants = [mutant for mutant in mutants if not options.only or mutant.name in options.only]
    if options.list:
        for mutant in mutants:
            print(f"{mutant.name}: {mutant.what}\n    {mutant.file}\n    {' '.join(mutant.tests)}")
        return 0
    if options.write:
        around_table(options.write, TABLE)  # a page without marks is refused before the work, not after it
    outcomes = run_all(mutants, options.jobs, options.baseline)
    print(summary(outcomes))
    if options.write:
        write_table(options.write, TABLE, table(mutants, outcomes, LIST))
    return int(any(outcome.word not in ("caught", "passed") for outcome in outcomes))


def run_all(mutants: Sequence[Mutant], jobs: int, baseline: bool) -> list[Outcome]:
    """Tests all faults, `jobs` in parallel, and prints a line for each when it is done."""
    work: list[tuple[str, Mutant | None, Sequence[str]]] = [(each.name, each, each.tests) for each in mutants]
    if baseline:
        work.insert(0, (BASELINE, None, list(dict.fromkeys(test for each in mutants for test in each.tests))))
    runner, outcomes = Runner(ROOT), []
    with ThreadPoolExecutor(jobs) as pool, progress(total=len(work), description="faults", unit="fault") as bar:
        try:
            for future in as_completed([pool.submit(runner.check, *each) for each in work]):
                outcome = future.result()
                outcomes.append(outcome)
                bar.write(f"{outcome.word:<8} {outcome.name} ({outcome.seconds:.0f} s) {outcome.detail}".rstrip())
                bar.update()
        except BaseException:
            runner.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return outcomes


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
