"""Measures the start of a run and its loader on data sets of 10,000 to a million synthetic rows, and writes the result as JSON.

    python -m benchmarking.data                                # make bench-data: 10k, 100k and 1M rows, and 100k image files
    python -m benchmarking.data --rows 10000 --files           # 10,000 rows of a saved data set, and no folder

Everything is the code of a training (benchmarking/start.py); only the payload is tiny: images of 64x64 pixels, and cache entries of
`tiny_bytes` instead of `real_bytes`, 1,000 rows in a shard as with real ones. Each measurement is a process of its own, which first
starts a run with eight images, so that imports do not count. `cold` has neither facts about the images nor cache entries, and makes
them; `warm` is the start after it. docs/performance.md explains the numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = "benchmarks/results/data"
SIZES = (10_000, 100_000, 1_000_000)
# So many images are held out, whatever the size of the data set.
HELD_OUT = 64
# Of one image and of one caption of SDXL at 1024x1024: two tensors [4, 128, 128], and [77, 2048] with [1280], in fp16.
REAL_BYTES = {"latents": 2 * 4 * 128 * 128 * 2, "text": (77 * 2048 + 1280) * 2}
TINY_BYTES = {"latents": 2 * 4 * 2 * 2 * 2, "text": 2 * 4 * 2}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parses the command line before torch is imported."""
    parser = argparse.ArgumentParser(
        description="Measures the start of a run and its loader on large synthetic data sets.", allow_abbrev=False
    )
    add = parser.add_argument
    add("--rows", type=int, nargs="*", default=list(SIZES), help="sizes of saved data sets (default: 10k, 100k and 1M)")
    add("--files", type=int, nargs="*", default=[100_000], help="sizes of folders of image files (default: 100k)")
    add("--folder", help="where data sets and caches are made and kept (default: a temporary folder)")
    add("--limit", type=float, default=1800, help="seconds after which a process is stopped (default: 1800)")
    add("--seconds", type=float, default=5.0, help="how long the loader gives samples (default: 5)")
    add("--results", metavar="FOLDER", default=RESULTS, help=f"folder for the result (default: {RESULTS})")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    ARGUMENTS = parse(sys.argv[1:])

import platform

from benchmarking.measured_code import ROOT, code_state, write_result
from benchmarking.synthetic_rows import save_files, save_rows
from sushi_research.config.process import run_main
from sushi_research.runs import machine
from testing.tiny_base import save_tiny_base


def main(arguments: argparse.Namespace) -> int:
    """Measures all sizes and writes one file."""
    with tempfile.TemporaryDirectory(prefix="benchmark-data-") as temporary:
        folder = Path(arguments.folder or temporary).absolute()
        base = folder / "base"
        if not base.exists():
            save_tiny_base(base, "sdxl")
        save_rows(folder / "rows-8", 8)
        found = [measure(arguments, folder, "rows", count) for count in arguments.rows]
        found += [measure(arguments, folder, "files", count) for count in arguments.files]
    result = {
        "real_bytes": REAL_BYTES,
        "tiny_bytes": TINY_BYTES,
        "measurements": found,
        "code": code_state(),
        "libraries": machine.library_versions(),
        "machine": {"cpus": os.cpu_count(), "platform": platform.platform(), "python": platform.python_version()},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    print("\n".join(lines(found)))
    path = write_result(Path(arguments.results), "data_sdxl", result)
    print(f"written to {path}")
    return 0


def measure(arguments: argparse.Namespace, folder: Path, kind: str, count: int) -> dict[str, Any]:
    """The parts of a cold and of a warm start with `count` images."""
    data = (save_rows if kind == "rows" else save_files)(folder / f"{kind}-{count}", count)
    work = folder / f"work-{kind}-{count}"
    found: dict[str, Any] = {"kind": kind, "images": count}
    if not work.exists():
        work.mkdir()
        found["cold"] = run_start(arguments, folder, data, work, fill=True)
    found["warm"] = run_start(arguments, folder, data, work, fill=False)
    return found


def run_start(arguments: argparse.Namespace, folder: Path, data: Path, work: Path, *, fill: bool) -> dict[str, Any]:
    """The parts that one process has measured, and whether it was stopped at the limit."""
    count = int(data.name.rpartition("-")[2])
    with tempfile.TemporaryDirectory() as own:
        parts = Path(own) / "parts.jsonl"
        spec = {
            "base": str(folder / "base"),
            "small": str(folder / "rows-8"),
            "data": str(data),
            "work": str(work),
            "held_out": HELD_OUT / count,
            "fill": fill,
            "seconds": arguments.seconds,
            "parts": str(parts),
        }
        command = [sys.executable, "-m", "benchmarking.start", json.dumps(spec)]
        found: dict[str, Any] = {"stopped": False}
        try:
            subprocess.run(command, cwd=ROOT, check=True, timeout=arguments.limit, stdout=subprocess.DEVNULL)
        except subprocess.TimeoutExpired:
            found = {"stopped": True, "limit": arguments.limit}
        done = [json.loads(line) for line in parts.read_text().splitlines()] if parts.exists() else []
    return found | {"parts": done}


def lines(found: Sequence[dict[str, Any]]) -> list[str]:
    """The measurements as rows of a Markdown table."""
    rows = ["| images | start | part | seconds | CPU seconds | peak MiB | samples/s |", "|---|---|---|---|---|---|---|"]
    for each in found:
        for start in ("cold", "warm"):
            for part in each.get(start, {}).get("parts", ()):
                cells = (f"{each['images']:,} {each['kind']}", start, part["part"], f"{part['seconds']:,.2f}")
                cells += (f"{part['cpu_seconds']:,.2f}", f"{part['peak_mib']:,.0f}", part.get("samples_per_second", ""))
                rows.append(f"| {' | '.join(map(str, cells))} |")
            if each.get(start, {}).get("stopped"):
                rows.append(
                    f"| {each['images']:,} {each['kind']} | {start} | stopped after {each[start]['limit']:g} s ||||| |"
                )
    return rows


if __name__ == "__main__":
    run_main(main, ARGUMENTS)
