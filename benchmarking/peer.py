"""Measures our training script against another program's: whole jobs, alternated, with equal work.

    make bench-peer PEER=diffusers/examples/text_to_image/train_text_to_image_lora.py           # on the demo's SD1.5 base, on a CPU
    make bench-peer PEER=sd-scripts/train_network.py PEER_PYTHON=sd-scripts/venv/bin/python
    python -m benchmarking.peer --peer .../train_text_to_image_lora_sdxl.py --base FOLDER --resolution 1024 --batch-size 4 \\
        --steps 50 --precision bf16

sd-scripts' UNet has the published size and cannot load the demo's bases: kohya's scripts get a base of that size with random
weights unless --base names one, and so little work by default that it ends in ten minutes on a CPU.

Supported are diffusers' scripts train_text_to_image_lora.py and train_text_to_image_lora_sdxl.py, and kohya's train_network.py and
sdxl_train_network.py. Both sides get the same base, images, captions, steps, batch size, rank, targets (attention), optimizer
(AdamW), learning rate and dtype; neither logs to TensorBoard or W&B. docs/performance.md ("Against other programs") explains it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from benchmarking.measured_code import ROOT
from benchmarking.peer_commands import (
    COMMANDS,
    DEFAULTS,
    RANK,
    RATE,
    architecture_of,
    base_for,
    device,
    make_images,
    our_command,
    program_of,
)
from sushi_research.errors import UserError

RESULTS = "benchmarks/results/peer"
# Steps at the beginning of a job that do not count in the time of a step.
WARMUP = 10


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measures our training script against another program's.", allow_abbrev=False
    )
    add = parser.add_argument
    add("--peer", metavar="SCRIPT", help="the other program's training script")
    add("--peer-python", metavar="PYTHON", default=sys.executable, help="the Python that runs it (default: this one)")
    base = "demo/base/<architecture>; for kohya's scripts one of the published size with random weights"
    add("--base", metavar="FOLDER", help=f"a base in the diffusers format (default: {base})")
    add("--images", metavar="FOLDER", default="demo/photos/star", help="captioned images (default: demo/photos/star)")
    add("--resolution", type=int, help=f"pixels of a side of the squares ({_defaults('resolution')})")
    add("--steps", type=int, help=f"steps of a job ({_defaults('steps')})")
    add("--batch-size", type=int, help=f"samples per step ({_defaults('batch_size')})")
    add("--rounds", type=int, help=f"rounds of four warm jobs, ours, peer, peer, ours ({_defaults('rounds')})")
    add("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="of both (default: fp32)")
    add("--results", metavar="FOLDER", default=RESULTS, help=f"folder for the JSON file (default: {RESULTS})")
    add("--table", nargs="+", metavar="FILE", help="only print these results as a Markdown table")
    found = parser.parse_args(arguments)
    if (found.peer is None) == (found.table is None):
        parser.error("give either --peer or --table")
    for name, value in DEFAULTS[program_of(Path(found.peer or ""))].items():
        if getattr(found, name) is None:
            setattr(found, name, value)
    for name, least in (("steps", WARMUP + 10), ("resolution", 8), ("batch_size", 1), ("rounds", 1)):
        if getattr(found, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}")
    return found


def _defaults(name: str) -> str:
    return f"default: {DEFAULTS['diffusers'][name]}; for kohya's scripts {DEFAULTS['kohya'][name]}"


def main(arguments: argparse.Namespace) -> int:
    """Runs the jobs, prints the result, and writes one file."""
    if arguments.table:
        from sushi_research.user_files import parse_json, read_regular

        print(TABLE_HEAD)
        for file in map(Path, arguments.table):
            print(table_row(parse_json(read_regular(file), str(file)), file.name))
        return 0
    from benchmarking.measured_code import code_state, write_result
    from sushi_research.fingerprints import content_hash
    from sushi_research.runs import machine

    script = Path(arguments.peer).resolve()
    if not script.is_file():
        raise UserError(f"--peer {arguments.peer} is not a file: give the path of the other program's training script.")
    if shutil.which(arguments.peer_python) is None:
        raise UserError(f"--peer-python {arguments.peer_python} is not a program: give the Python that runs the peer.")
    architecture = architecture_of(script)
    with tempfile.TemporaryDirectory(prefix="peer-") as folder:
        work = Path(folder)
        count = make_images(Path(arguments.images), work / "images", arguments.resolution, arguments.batch_size)
        base, base_name = base_for(work, script, arguments.base)
        jobs = run_jobs(work, script, base, arguments)
    result = {
        "peer": f"{program_of(script)} {script.name}",
        "peer_hash": content_hash(script.read_bytes()),
        "model": architecture,
        **compare(jobs, arguments.steps),
        "config": {
            "base": base_name,
            "images": count,
            "rank": RANK,
            "learning_rate": RATE,
            "optimizer": "adamw",
            **{key: getattr(arguments, key) for key in ("resolution", "steps", "batch_size", "precision", "rounds")},
        },
        "jobs": jobs,
        "code": code_state(),
        "libraries": machine.library_versions(),
        "machine": {"device": device(), "cpus": os.cpu_count(), "threads": os.environ.get("OMP_NUM_THREADS")},
        "python": platform.python_version(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    print(sentence(result))
    print(f"written to {write_result(Path(arguments.results), f'{program_of(script)}_{architecture}', result)}")
    return 0


def run_jobs(work: Path, script: Path, base: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All jobs in their order: one cold job of each side, then rounds of four warm ones."""
    jobs = []
    for number, side in enumerate(["ours", "peer", *["ours", "peer", "peer", "ours"] * arguments.rounds]):
        name = f"job-{number}"
        if side == "ours":
            command, python = our_command(work, script, base, arguments, name), sys.executable
        else:
            command, python = COMMANDS[script.name](work, script, base, arguments, name), arguments.peer_python
        job = run_job(work, python, command, with_stand_in=side == "peer")
        losses = _our_losses(work / "our_runs" / name) if side == "ours" else job["losses"]
        steps = job.pop("steps")[-arguments.steps :]  # our plan has tried the optimizer before
        gaps = [[b - a for a, b in zip(one, other, strict=True)] for one, other in zip(steps, steps[1:], strict=False)]
        job |= {"side": side, "kind": "cold" if number < 2 else "warm", "losses": losses}
        job["step_seconds"], job["step_cpu_seconds"] = (median(column) for column in zip(*gaps[WARMUP:], strict=True))
        jobs.append(job)
        said = (
            f"{job['seconds']:.1f} s, {job['cpu_seconds']:.1f} CPU s, step {job['step_cpu_seconds'] * 1e3:.1f} CPU ms"
        )
        print(f"{side} {job['kind']}: {said}", flush=True)
    return jobs


def run_job(work: Path, python: str, command: list[str], *, with_stand_in: bool) -> dict[str, Any]:
    """One job: wall and CPU seconds, peak memory in bytes, and what peer_job.py recorded. UserError if it fails."""
    report, log = work / "job.json", work / "job.log"
    report.unlink(missing_ok=True)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    environment["PYTHONPATH"] = "" if with_stand_in else str(ROOT)
    if with_stand_in and not _has_torchvision(python):
        environment["STAND_INS"] = str(ROOT / "benchmarking/stand_ins")
    start = time.perf_counter()
    with log.open("wb") as out:
        worker = str(ROOT / "benchmarking/peer_job.py")
        process = subprocess.Popen([python, worker, str(report), *command], stdout=out, stderr=out, env=environment)
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - start
    if process.returncode or not report.exists():
        end = log.read_text(errors="replace").strip()[-2000:]  # the log itself is in a temporary folder
        print(end, file=sys.stderr)
        last = end.splitlines()[-1] if end else "it said nothing"
        name, status = Path(command[0]).name, process.returncode
        raise UserError(f"{name} ended with status {status} ({last}): see its last lines above.")
    found = json.loads(report.read_text())
    return {
        "seconds": seconds,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "peak_process_bytes": used.ru_maxrss * 1024,
        **found,
    }


def _has_torchvision(python: str) -> bool:
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('torchvision') is None)"
    return subprocess.run([python, "-c", code]).returncode == 0


def _our_losses(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [found["loss"] for line in lines if "loss" in (found := json.loads(line))]


def compare(jobs: list[Mapping[str, Any]], steps: int) -> dict[str, Any]:
    """Ratios of the peer's numbers to ours, and whether the mean losses agree."""
    of = {
        (side, kind): [job for job in jobs if job["side"] == side and job["kind"] == kind]
        for side in ("ours", "peer")
        for kind in ("cold", "warm")
    }

    def each(key: str, kind: str = "warm") -> dict[str, float]:
        return {side: median(job[key] for job in of[side, kind]) for side in ("ours", "peer")}

    def ratio(values: Mapping[str, float]) -> float:
        return values["peer"] / values["ours"]

    found: dict[str, Any] = {}
    for name, key, kind in (
        ("warm_job", "seconds", "warm"),
        ("warm_job_cpu", "cpu_seconds", "warm"),
        ("cold_job", "seconds", "cold"),
        ("cold_job_cpu", "cpu_seconds", "cold"),
        ("step", "step_seconds", "warm"),
        ("step_cpu", "step_cpu_seconds", "warm"),
    ):
        values = each(key, kind)
        found[name] = {**values, "ratio": ratio(values)}
    # The lowest and the highest ratio of one warm job to another.
    pairs = [peer["cpu_seconds"] / our["cpu_seconds"] for peer in of["peer", "warm"] for our in of["ours", "warm"]]
    found["warm_job_cpu"] |= {"low": min(pairs), "high": max(pairs)}
    memory = "allocated" if jobs[0].get("allocated") else "peak_process_bytes"
    found["peak_bytes"] = {"what": memory, **each(memory)}
    found["losses"] = losses_agree(*(of[side, "warm"][0]["losses"] for side in ("ours", "peer")), steps)
    return found


def losses_agree(ours: list[float], peer: list[float], steps: int) -> dict[str, Any]:
    """The mean losses with their standard errors, and whether they differ by less than twice that of the difference.

    The two draw other noise and other timesteps, so single losses cannot be equal. A loss of a timestep varies by a factor of
    ten, which makes the standard error of 100 steps a few per cent. UserError unless both have a loss for each step.
    """
    if not len(ours) == len(peer) == steps:
        raise UserError(
            f"of {steps} steps, ours recorded {len(ours)} losses and the peer {len(peer)}: their work differs."
        )
    means, errors = [mean(ours), mean(peer)], [stdev(each) / len(each) ** 0.5 for each in (ours, peer)]
    band = 2 * (errors[0] ** 2 + errors[1] ** 2) ** 0.5
    return {
        "mean": dict(zip(("ours", "peer"), means, strict=True)),
        "standard_error": dict(zip(("ours", "peer"), errors, strict=True)),
        "difference": means[1] - means[0],
        "band": band,
        "agree": abs(means[1] - means[0]) <= band,
    }


def sentence(result: Mapping[str, Any]) -> str:
    """A result as text."""

    def times(name: str) -> str:
        values = result[name]
        return f"{values['ratio']:.2f} times ({values['peer']:.4g} and {values['ours']:.4g} s)"

    losses, memory = result["losses"], result["peak_bytes"]
    verdict = "agree" if losses["agree"] else "DO NOT AGREE, so the work is not equal"
    return "\n".join(
        [
            f"{result['model']}, {result['config']['steps']} steps: {result['peer']} takes, compared with ours,",
            f"  by CPU time:  step {times('step_cpu')}, warm job {times('warm_job_cpu')}, cold job {times('cold_job_cpu')}",
            f"  by the clock: step {times('step')}, warm job {times('warm_job')}, cold job {times('cold_job')}",
            f"  peak memory ({memory['what']}): {memory['peer'] / 2**30:.2f} and {memory['ours'] / 2**30:.2f} GiB",
            f"  mean losses {losses['mean']['peer']:.4f} and {losses['mean']['ours']:.4f} {verdict}: they differ by "
            f"{losses['difference']:+.4f}, and twice the standard error is {losses['band']:.4f}",
        ]
    )


TABLE_HEAD = (
    "| peer | model, resolution, batch, dtype | device | step by CPU (by the clock) | warm job | cold job | GiB: peer, ours | "
    "mean loss: peer, ours (2 SE) | file |\n|---|---|---|---|---|---|---|---|---|"
)


def table_row(result: Mapping[str, Any], file: str) -> str:
    """A result as a row of the table in docs/performance.md."""
    config, losses, memory = result["config"], result["losses"], result["peak_bytes"]

    def both(name: str) -> str:
        return f"{result[f'{name}_cpu']['ratio']:.2f} ({result[name]['ratio']:.2f})"

    cells = (
        result["peer"],
        f"{result['model']}, {config['resolution']}, {config['batch_size']}, {config['precision']}",
        result["machine"]["device"],
        *(both(name) for name in ("step", "warm_job", "cold_job")),
        f"{memory['peer'] / 2**30:.2f}, {memory['ours'] / 2**30:.2f}",
        f"{losses['mean']['peer']:.4f}, {losses['mean']['ours']:.4f} ({losses['band']:.4f})",
        f"`{file}`",
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    ARGUMENTS = parse()
    from sushi_research.config.process import run_main

    run_main(main, ARGUMENTS)
