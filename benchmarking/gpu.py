"""Measures the training step on a GPU, in rows: rates and memory of SDXL and SD1.5 at their real sizes with random weights.

    make bench-gpu                              # eight minutes at most; results in benchmarks/results/gpu
    make bench-gpu PY=python3                   # with that Python, on a machine without a registry (benchmarking/gpu_pack.py)
    python -m benchmarking.gpu --only sdxl-b16 sdxl-nf4
    python -m benchmarking.gpu --table benchmarks/results/gpu/*.json

SDXL at batch size 1 and 4 runs for two minutes each, because Hopper cards settle 7 to 13 % below their first 20 seconds; all other
rows take 20 seconds and are marked `short`. Rows run in this file's order in one process, and after one that fails in a new one, so
that it does not stop the others. What no longer fits in --minutes is named. docs/performance.md has the results.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from sushi_research.errors import UserError, first_line

RESULTS = "benchmarks/results/gpu"
ROOT = Path(__file__).parents[1]
SUSTAINED, SHORT = 120.0, 20.0
# Seconds around the steps of a row: reading 5 GB of weights, warm-up.
AROUND = 12.0


@dataclass(frozen=True)
class Row:
    """A row: the function that measures it, in benchmarking/gpu_rows.py, and its arguments. `seconds` are those of its steps."""

    name: str
    function: str
    seconds: float
    arguments: dict[str, Any]

    @property
    def is_exact(self) -> bool:
        return self.function == "equality"

    @property
    def kind(self) -> str:
        return "sustained" if self.seconds >= SUSTAINED else "short"


def _train(name: str, architecture: str, seconds: float = SHORT, **arguments: Any) -> Row:
    return Row(name, "train", seconds, {"architecture": architecture, **arguments})


# The most important first.
ROWS = (
    Row("sd15-equal", "equality", 5.0, {"architecture": "sd15"}),
    Row("sdxl-equal", "equality", 5.0, {"architecture": "sdxl"}),
    Row("probe", "probe", 5.0, {}),
    _train("sdxl-b1", "sdxl", SUSTAINED, batch_size=1),
    _train("sdxl-b4", "sdxl", SUSTAINED, batch_size=4),
    _train("sdxl-b1-eager", "sdxl", batch_size=1, recorded=False),
    _train("sd15-b8", "sd15", batch_size=8),
    _train("sdxl-b16", "sdxl", batch_size=16),
    _train("sdxl-nf4", "sdxl", batch_size=1, checkpointing="all", optimizer="adamw8bit", storage="nf4"),
    _train("sdxl-int8", "sdxl", batch_size=1, checkpointing="all", optimizer="adamw8bit", storage="int8"),
    _train("sdxl-fp8", "sdxl", batch_size=1, checkpointing="all", optimizer="adamw8bit", storage="fp8"),
    _train("sdxl-bf16-all", "sdxl", batch_size=1, checkpointing="all", optimizer="adamw8bit"),
    _train("sdxl-b4-feed-forward", "sdxl", batch_size=4, checkpointing="feed_forward"),
    _train("sdxl-b4-all", "sdxl", batch_size=4, checkpointing="all"),
    _train("sdxl-b1-8bit", "sdxl", batch_size=1, optimizer="adamw8bit"),
    _train("sdxl-b4-eager", "sdxl", batch_size=4, recorded=False),
    _train("sd15-b1", "sd15", batch_size=1),
    _train("sd15-b1-eager", "sd15", batch_size=1, recorded=False),
)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measures the training step on a GPU, in rows.", allow_abbrev=False)
    add = parser.add_argument
    add("--minutes", type=float, default=7.5, help="time for all rows; the rest is left out by name (default: 7.5)")
    add("--only", nargs="+", metavar="ROW", choices=[row.name for row in ROWS], help="only these rows")
    add("--bases", metavar="FOLDER", help="where the UNets with random weights are kept (default: a temporary folder)")
    add("--peer", metavar="SCRIPT", help="at last also whole jobs against another program's script (benchmarking.peer)")
    add("--results", metavar="FOLDER", default=RESULTS, help=f"folder for the JSON file (default: {RESULTS})")
    add("--dry", action="store_true", help="a rehearsal on a CPU with narrow UNets; its numbers mean nothing")
    add("--table", nargs="+", metavar="FILE", help="only print these results as a Markdown table")
    # The process of some rows, and the time of day at which the last of them must have ended.
    add("--rows", nargs="+", help=argparse.SUPPRESS)
    add("--until", type=float, help=argparse.SUPPRESS)
    found = parser.parse_args(arguments)
    if not 0 < found.minutes <= 1440:
        parser.error(f"--minutes {found.minutes:g} must be above 0 and at most 1440, a day")
    return found


def main(arguments: argparse.Namespace) -> int:
    """Runs the rows, prints each, and writes one file."""
    if arguments.table:
        print(TABLE_HEAD)
        for file in map(Path, arguments.table):
            print("\n".join(table_rows(json.loads(file.read_text()))))
        return 0
    import torch

    if not arguments.dry and not torch.cuda.is_available():
        raise UserError("torch finds no CUDA device here: run it on a machine with a GPU, or rehearse it with --dry.")
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as folder:
        result = measure(arguments, Path(arguments.bases or folder).resolve())
    from benchmarking.measured_code import write_result

    name = "rehearsal" if arguments.dry else result["card"].lower().replace(" ", "_")
    print(f"written to {write_result(Path(arguments.results), name, result)}")
    print(TABLE_HEAD, *table_rows(result), sep="\n")
    return 0


def measure(arguments: argparse.Namespace, bases: Path) -> dict[str, Any]:
    """All rows within their time, with the circumstances."""
    from benchmarking.measured_code import code_state
    from sushi_research.runs import machine

    card, until, rows = card_of(), time.time() + arguments.minutes * 60, []
    waiting = [row for row in ROWS if not arguments.only or row.name in arguments.only]
    while waiting:
        # Deterministic cuBLAS needs its setting from the start of the process, where other rows must not have it.
        together = [row for row in waiting if row.is_exact == waiting[0].is_exact]
        for found in run_rows(together, arguments, bases, until):
            row = waiting.pop(waiting.index(next(row for row in waiting if row.name == found["row"])))
            rows.append({"row": row.name, "kind": row.kind, "card": card["name"], **found})
            print(describe(rows[-1]), flush=True)
    if arguments.peer:
        rows.append(_peer(arguments, bases, until))
        print(describe(rows[-1]), flush=True)
    return {
        "card": card["name"],
        "card_facts": card,
        "rows": rows,
        "code": code_state(),
        "libraries": machine.library_versions(),
        "machine": {"python": platform.python_version(), "cpus": os.cpu_count(), "platform": platform.platform()},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def left_out(row: Row, card: dict[str, Any], seconds: float) -> dict[str, str] | None:
    """Why a row is not measured; None if it is. `seconds` are what is left."""
    if row.arguments.get("batch_size") == 16 and card["gib"] < 100 and not card["is_rehearsal"]:
        return {
            "left_out": f"batch size 16 without checkpointing needs about 92 GiB, and the card has {card['gib']:.0f}"
        }
    if seconds < row.seconds + AROUND:
        return {"left_out": f"no time left: make bench-gpu ONLY={row.name}"}
    return None


def run_rows(rows: Sequence[Row], arguments: argparse.Namespace, bases: Path, until: float) -> list[dict[str, Any]]:
    """What a process measured of these rows, in their order, up to the first one that failed."""
    report = bases / "rows.jsonl"
    bases.mkdir(parents=True, exist_ok=True)
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarking.gpu", "--bases", str(bases), "--until", str(until)]
    command += [*(["--dry"] if arguments.dry else []), "--rows", *(row.name for row in rows)]
    environment = os.environ | ({"CUBLAS_WORKSPACE_CONFIG": ":4096:8"} if rows[0].is_exact else {})
    limit = max(10.0, until - time.time() + 15)
    with (bases / "log").open("w+", errors="replace") as log:
        why = _run(command, environment, log, limit)
        log.seek(0)
        errors = log.read()
    found = [json.loads(line) for line in report.read_text().splitlines()] if report.exists() else []
    if len(found) < len(rows) and not (found and "failed" in found[-1]):
        found.append({"row": rows[len(found)].name, "failed": why, "log": errors.strip().splitlines()[-30:]})
    return found


def _run(command: Sequence[str], environment: Mapping[str, str], log: TextIO, limit: float) -> str:
    """Runs a process to its end, or to its limit in seconds. Returns how it ended."""
    try:
        status = subprocess.run(command, cwd=ROOT, env=environment, stderr=log, stdout=log, timeout=limit).returncode
    except subprocess.TimeoutExpired:
        return "it did not end in time"
    return f"its process ended with status {status}"


def measure_rows(arguments: argparse.Namespace) -> int:
    """The process of some rows: measures one after the other, and ends after one that fails."""
    from benchmarking import gpu_rows

    bases, card = Path(arguments.bases), card_of()
    for row in (row for row in ROWS if row.name in arguments.rows):
        started = time.monotonic()
        found = left_out(row, card, arguments.until - time.time())
        if found is None:
            seconds = 0.0 if arguments.dry else row.seconds
            try:
                found = gpu_rows.FUNCTIONS[row.function](bases, seconds, dry=arguments.dry, **row.arguments)
            except Exception as error:
                found = {
                    "failed": f"{type(error).__name__}: {first_line(error)}",
                    "log": traceback.format_exc().splitlines(),
                }
            found |= {"row_seconds": time.monotonic() - started, **clocks()}
        with (bases / "rows.jsonl").open("a") as file:
            file.write(json.dumps({"row": row.name, **found}) + "\n")
        if "failed" in found:
            return 1
    return 0


def _peer(arguments: argparse.Namespace, bases: Path, until: float) -> dict[str, Any]:
    from testing.full_base import save_full_base

    architecture = "sdxl" if "sdxl" in Path(arguments.peer).name else "sd15"
    base = save_full_base(bases / "whole", architecture, device="cuda")
    command = [sys.executable, "-m", "benchmarking.peer", "--peer", arguments.peer, "--base", str(base)]
    command += ["--precision", "bf16", "--resolution", "1024" if architecture == "sdxl" else "512", "--batch-size", "4"]
    command += ["--steps", "50", "--rounds", "1", "--results", str(Path(arguments.results).resolve())]
    limit = max(10.0, until - time.time())
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"row": "peer", "kind": "short", "failed": f"no time left after {limit:.0f} s: make bench-peer PEER=..."}
    said = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    return {"row": "peer", "kind": "short", **({"said": said} if done.returncode == 0 else {"failed": said[-1]})}


def card_of() -> dict[str, Any]:
    """The card's name and memory, by nvidia-smi: a CUDA context of this process would count as a row's memory."""
    import torch

    if not torch.cuda.is_available():
        return {"name": "CPU (rehearsal)", "gib": 0.0, "is_rehearsal": True}
    if found := _nvidia_smi("name,memory.total"):
        name, gib = found["name"], float(found["memory.total"].split()[0]) / 1024
    else:
        facts = torch.cuda.get_device_properties(0)
        name, gib = facts.name, facts.total_memory / 2**30
    return {"name": name, "gib": gib, "is_rehearsal": False, **clocks()}


def clocks() -> dict[str, str]:
    """The card's driver, clock, power and temperature now; {} without nvidia-smi."""
    return _nvidia_smi("driver_version,clocks.sm,power.draw,temperature.gpu")


def _nvidia_smi(names: str) -> dict[str, str]:
    command = ["nvidia-smi", "-i", "0", f"--query-gpu={names}", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    lines = found.stdout.splitlines()
    if found.returncode or not lines:
        return {}
    return dict(zip(names.split(","), (value.strip() for value in lines[0].split(",")), strict=True))


def describe(row: dict[str, Any]) -> str:
    """A row on one line."""
    if "left_out" in row or "failed" in row:
        return f"{row['row']:<22} {'left out: ' + row['left_out'] if 'left_out' in row else 'FAILED: ' + row['failed']}"
    hidden = ("row", "kind", "card", "log", "said")
    shown = ", ".join(
        f"{name} {f'{value:.4g}' if isinstance(value, float) else value}"
        for name, value in row.items()
        if name not in hidden
    )
    return f"{row['row']:<22} {row['kind']}: {shown or row.get('said')}"


TABLE_HEAD = (
    "| card | row | path | ms: first 20 s, settled | images/s | TFLOP/s | GiB allocated, reserved, on the card | |\n"
    "|---|---|---|---|---|---|---|---|"
)


def table_rows(result: dict[str, Any]) -> list[str]:
    """The rows of a result for the table in docs/performance.md: those that train; others are in the file."""
    found = []
    for row in result["rows"]:
        if "first_ms" not in row:
            continue

        def both(name: str, digits: str, row: dict[str, Any] = row) -> str:
            return ", ".join(f"{row[key]:{digits}}" for key in (f"first_{name}", f"settled_{name}") if key in row)

        memory = ", ".join(
            f"{row[key]:.2f}" for key in ("allocated_gib", "reserved_gib", "on_the_card_gib") if key in row
        )
        cells = [
            row["card"],
            row["row"],
            row["path"],
            both("ms", ".1f"),
            both("images_per_second", ".2f"),
            both("tflops", ".0f"),
        ]
        found.append(f"| {' | '.join([*cells, memory, '' if row['kind'] == 'sustained' else 'short'])} |")
    return found


if __name__ == "__main__":
    ARGUMENTS = parse()
    from sushi_research.config.process import run_main

    run_main(measure_rows if ARGUMENTS.rows else main, ARGUMENTS)
