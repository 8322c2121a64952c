"""Measures the training step on a GPU, in rows: rates and memory of SDXL and SD1.5 at their real sizes with random weights.

    make bench-gpu                              # eight minutes at most; results in benchmarks/results/gpu
    make bench-gpu PY=python3                   # with that Python, on a machine without a registry (benchmarking/gpu_pack.py)
    python -m benchmarking.gpu --only sdxl-b16 sdxl-nf4
    python -m benchmarking.gpu --table benchmarks/results/gpu/*.json

SDXL at batch size 1 and 4 runs for two minutes each, because Hopper cards settle 7 to 13 % below their first 20 seconds; all other
rows take 20 seconds and are marked `short`. Rows run in this file's order, each in a process of its own, so that one that fails
does not stop the others. What no longer fits in --minutes is named. docs/performance.md has the results.
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
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = "benchmarks/results/gpu"
ROOT = Path(__file__).parents[1]
SUSTAINED, SHORT = 120.0, 20.0
# Seconds around the steps of a row: imports, reading 5 GB of weights, warm-up.
AROUND = 20.0


@dataclass(frozen=True)
class Row:
    """A row: the function that measures it, in benchmarking/gpu_rows.py, and its arguments. `seconds` are those of its steps."""

    name: str
    function: str
    seconds: float
    arguments: dict[str, Any]

    @property
    def kind(self) -> str:
        return "sustained" if self.seconds >= SUSTAINED else "short"


def _train(name: str, architecture: str, seconds: float = SHORT, **arguments: Any) -> Row:
    return Row(name, "train", seconds, {"architecture": architecture, **arguments})


# The most important first.
ROWS = (
    Row("probe", "probe", 5.0, {}),
    Row("sd15-equal", "equality", 5.0, {"architecture": "sd15"}),
    Row("sdxl-equal", "equality", 5.0, {"architecture": "sdxl"}),
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
    add("--row", help=argparse.SUPPRESS)  # the process of one row
    return parser.parse_args(arguments)


def main(arguments: argparse.Namespace) -> int:
    """Runs the rows, prints each, and writes one file."""
    from sushi_research.errors import UserError

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

    card = card_of()
    until, rows = time.monotonic() + arguments.minutes * 60, []
    for row in ROWS:
        if arguments.only and row.name not in arguments.only:
            continue
        found = left_out(row, card, until - time.monotonic()) or run_row(row, arguments, bases, until)
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


def run_row(row: Row, arguments: argparse.Namespace, bases: Path, until: float) -> dict[str, Any]:
    """A row in a process of its own; what went wrong is in "failed"."""
    report = bases / "row.json"
    bases.mkdir(parents=True, exist_ok=True)
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarking.gpu", "--row", row.name, "--bases", str(bases)]
    # Deterministic cuBLAS needs it from the start of the process.
    environment = os.environ | ({"CUBLAS_WORKSPACE_CONFIG": ":4096:8"} if row.function == "equality" else {})
    limit = max(10.0, min(until - time.monotonic() + 10, row.seconds * 1.5 + 90))
    try:
        done = subprocess.run(
            [*command, *(["--dry"] if arguments.dry else [])],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=limit,
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"it took longer than {limit:.0f} s"}
    if done.returncode or not report.exists():
        lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        return {"failed": lines[-1][:500], "log": lines[-30:]}
    return json.loads(report.read_text())


def one_row(arguments: argparse.Namespace) -> int:
    """The process of one row: measures it and writes its report."""
    from benchmarking import gpu_rows

    row = next(row for row in ROWS if row.name == arguments.row)
    seconds = 0.0 if arguments.dry else row.seconds
    bases = Path(arguments.bases)
    started = time.monotonic()
    found = gpu_rows.FUNCTIONS[row.function](bases, seconds, dry=arguments.dry, **row.arguments)
    found |= {"process_seconds": time.monotonic() - started, **clocks()}
    (bases / "row.json").write_text(json.dumps(found))
    return 0


def _peer(arguments: argparse.Namespace, bases: Path, until: float) -> dict[str, Any]:
    from testing.full_base import save_full_base

    base = save_full_base(bases / "whole", "sdxl" if "sdxl" in Path(arguments.peer).name else "sd15", device="cuda")
    command = [
        sys.executable,
        "-m",
        "benchmarking.peer",
        "--peer",
        arguments.peer,
        "--base",
        str(base),
        "--precision",
        "bf16",
    ]
    size = ["--resolution", "1024", "--batch-size", "4"] if "sdxl" in base.parent.name else ["--resolution", "512"]
    command += [*size, "--steps", "50", "--rounds", "1", "--results", str(Path(arguments.results).resolve())]
    limit = max(10.0, until - time.monotonic())
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"row": "peer", "kind": "short", "failed": f"no time left after {limit:.0f} s: make bench-peer PEER=..."}
    said = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    return {"row": "peer", "kind": "short", **({"said": said} if done.returncode == 0 else {"failed": said[-1]})}


def card_of() -> dict[str, Any]:
    """The card's name and memory."""
    import torch

    if not torch.cuda.is_available():
        return {"name": "CPU (rehearsal)", "gib": 0.0, "is_rehearsal": True}
    facts = torch.cuda.get_device_properties(0)
    return {"name": facts.name, "gib": facts.total_memory / 2**30, "is_rehearsal": False, **clocks()}


def clocks() -> dict[str, str]:
    """The card's clock, power and temperature as nvidia-smi shows them now; {} without it."""
    names = "driver_version,clocks.sm,power.draw,temperature.gpu"
    command = ["nvidia-smi", "-i", "0", f"--query-gpu={names}", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = [value.strip() for value in found.stdout.splitlines()[0].split(",")] if found.stdout.strip() else []
    return dict(zip(names.split(","), values, strict=False)) if found.returncode == 0 else {}


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

    run_main(one_row if ARGUMENTS.row else main, ARGUMENTS)
