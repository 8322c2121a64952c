"""Counts what a training step costs, on fake tensors of the real models, and compares it with benchmarks/ledger.json.

    make proxy                             # count all again; exit status 1 if a number got worse
    python -m benchmarking.proxy --write   # count all and accept it: writes the ledger, and its table in docs/performance.md

Nothing depends on the machine: no GPU, no weights, no times. docs/performance.md explains the numbers.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parses the command line before torch is imported."""
    parser = argparse.ArgumentParser(
        description="Counts what a training step costs and compares it with benchmarks/ledger.json: 8 minutes of CPU time, on "
        "as many cores as there are.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--write", action="store_true", help="accept the numbers: write the ledger and the table in the docs"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    # Before the imports below. Fake tensors have no numbers, so more threads have nothing to do.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    ARGUMENTS = parse(sys.argv[1:])

import logging
import multiprocessing
from concurrent.futures import ProcessPoolExecutor, as_completed

# In each process, its import tells of an optional kernel that is not installed.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

from benchmarking import ledger
from benchmarking.fake_step import count_step
from sushi_research.config.process import run_main
from sushi_research.progress import progress
from testing import result_pages


def count_all() -> dict[str, dict[str, int]]:
    """All rows of the ledger, counted in as many processes as there are cores; the longest rows first."""
    cases = ledger.cases()
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(min(os.cpu_count() or 1, len(cases)), mp_context=context) as pool,
        progress(total=len(cases), description="counting", unit="step") as bar,
    ):
        started = {pool.submit(count_step, *case): case for case in reversed(cases)}
        for done in as_completed(started):
            done.result()
            bar.update()
    return {ledger.key_of(case): done.result() for done, case in started.items()}


def main(arguments: argparse.Namespace) -> int:
    """Counts, then compares or writes. Returns the exit status: 1 if a number got worse."""
    rows = count_all()
    worse, better = ledger.differences(ledger.read(), rows) if ledger.FILE.exists() else (["there is no ledger"], [])
    for title, sentences in (("worse", worse), ("better", better)):
        for sentence in sentences:
            print(f"{title}: {sentence}")
    if arguments.write:
        ledger.write(rows)
        result_pages.write_table(ledger.PAGE, "ledger", ledger.table(ledger.read()))
        print(f"written to {ledger.FILE} and {ledger.PAGE}")
        return 0
    if worse or better:
        print("accept these numbers with: python -m benchmarking.proxy --write")
    else:
        print("all numbers are those of the ledger")
    return 1 if worse else 0


if __name__ == "__main__":
    run_main(main, ARGUMENTS)
