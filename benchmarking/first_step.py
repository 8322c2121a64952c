"""Measures a training's start: CPU seconds from the command to the first step, against imports and the UNet's weights alone.

    make bench-start                                          # SD1.5 at its real size with random weights, filled caches
    python -m benchmarking.first_step --model sdxl --base FOLDER --rounds 5

A round has one start of each kind, in turn, each a process of its own (benchmarking/traced_start.py). The first start of all
fills the caches and is not counted. CPU seconds are counted, because other work on the machine changes them least.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from sushi_research import models
from sushi_research.errors import UserError

RESULTS = "benchmarks/results/start"
RESOLUTION = 128  # the first step is not what is measured
IMAGES = 8


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measures a training's start against imports and weights.", allow_abbrev=False
    )
    add = parser.add_argument
    add("--model", choices=tuple(models.ARCHITECTURES), default="sd15", help="architecture (default: sd15)")
    add("--base", metavar="FOLDER", help="a base; default: one of the real size with random weights, made for this")
    add("--rounds", type=int, default=3, help="rounds that count (default: 3)")
    add("--precision", choices=("bf16", "fp16", "fp32"), default="bf16", help="of the UNet (default: bf16)")
    add("--optimizer", default="adamw8bit", help="optimizer.name (default: adamw8bit, that of the recipes)")
    add("--results", metavar="FOLDER", default=RESULTS, help=f"folder for the JSON file (default: {RESULTS})")
    return parser.parse_args(arguments)


def main(arguments: argparse.Namespace) -> int:
    """Measures, prints a table, and writes one file."""
    from benchmarking.measured_code import code_state, write_result
    from sushi_research.runs import machine

    with tempfile.TemporaryDirectory(prefix="first-step-") as work:
        base = Path(arguments.base) if arguments.base else _full_base(Path(work), arguments.model)
        rounds = measure(Path(work), base, arguments)
    found = {kind: summary([each[kind] for each in rounds]) for kind in ("script", "bare")}
    result = {
        "model": arguments.model,
        "ratio": before_training(found["script"]) / sum(found["bare"].values()),
        "cpu_seconds": found,
        "seconds": {kind: median(sum(wall for _, wall, _ in each[kind]) for each in rounds) for kind in found},
        "config": {key: getattr(arguments, key) for key in ("precision", "optimizer", "rounds")},
        "rounds": rounds,
        "code": code_state(),
        "libraries": machine.library_versions(),
        "machine": {"device": machine.device_name("cpu"), "cpus": os.cpu_count(), "platform": platform.platform()},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    print(describe(result))
    print(f"written to {write_result(Path(arguments.results), arguments.model, result)}")
    return 0


def measure(work: Path, base: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The rounds: for each kind of start its stages as [name, wall, CPU seconds]."""
    _make_images(work / "images")
    root = Path(__file__).parents[1]
    words = {
        "model.base": base,
        "data.path": work / "images",
        "data.resolution": RESOLUTION,
        "cache.folder": work / "cache",
        "run.folder": work / "runs",
        "train.steps": 3,
        "train.batch_size": 1,
        "train.precision": arguments.precision,
        "optimizer.name": arguments.optimizer,
        "sample.enabled": "false",
        "tracking.wandb": "off",
    }
    script = [str(root / f"scripts/train_{arguments.model}_lora.py")]
    script += [word for key, value in words.items() for word in (f"--{key}", str(value))]
    weights = sorted((base / "unet").glob("*.safetensors"))
    if len(weights) != 1:
        raise UserError(f"{base}/unet has {len(weights)} weight files, and this reads one: save the base in one file.")
    dtype = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[arguments.precision]
    kinds = {"script": script, "bare": [str(weights[0]), dtype, arguments.optimizer]}
    rounds = []
    for number in range(arguments.rounds + 1):
        done = {}
        for kind, rest in kinds.items():
            report = work / f"{kind}.json"
            run_name = ["--run.name", f"start-{number}"] if kind == "script" else []
            command = [sys.executable, "-m", "benchmarking.traced_start", kind, str(report), *rest, *run_name]
            report.unlink(missing_ok=True)
            ended = subprocess.run(command, cwd=root, capture_output=True, text=True)
            if not report.exists():
                raise UserError(f"the start ended with status {ended.returncode}: {ended.stderr.strip()[-2000:]}")
            done[kind] = json.loads(report.read_text())["stages"]
        rounds += [done] if number else []
    return rounds


def summary(starts: list[list[Any]]) -> dict[str, float]:
    """The median CPU seconds of each stage over several starts; a stage that was entered several times counts once."""
    totals: list[dict[str, float]] = []
    for stages in starts:
        total: dict[str, float] = {}
        for name, _, cpu in stages:
            total[name] = total.get(name, 0.0) + cpu
        totals.append(total)
    return {name: median(total.get(name, 0.0) for total in totals) for name in totals[0]}


def before_training(stages: dict[str, float]) -> float:
    """CPU seconds until the first step begins."""
    return sum(seconds for name, seconds in stages.items() if name != "training")


def describe(result: dict[str, Any]) -> str:
    """The result as text."""
    script, bare = result["cpu_seconds"]["script"], result["cpu_seconds"]["bare"]
    stages = ", ".join(f"{name} {seconds:.2f}" for name, seconds in script.items() if name != "training")
    parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in bare.items())
    return (
        f"{result['model']}: {before_training(script):.2f} CPU seconds to the first step ({stages}), {sum(bare.values()):.2f} for "
        f"imports and weights alone ({parts}): {result['ratio']:.2f} times; the first step takes {script['training']:.2f}"
    )


def _full_base(work: Path, architecture: str) -> Path:
    from testing.full_base import save_full_base

    print(f"making a {architecture} base of the real size with random weights", flush=True)
    return save_full_base(work / "base", architecture)


def _make_images(folder: Path) -> None:
    import numpy as np
    from PIL import Image

    folder.mkdir()
    for number in range(IMAGES):
        pixels = np.random.default_rng(number).integers(0, 256, (RESOLUTION, RESOLUTION, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture number {number}\n")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    ARGUMENTS = parse()
    from sushi_research.config.process import run_main

    run_main(main, ARGUMENTS)
