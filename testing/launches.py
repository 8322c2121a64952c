"""The environment of fault injection: tiny bases and images, the setups, and launches of the real scripts as processes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from dataclasses import dataclass, field, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sushi_research import randomness
from sushi_research.models import ARCHITECTURES
from testing import process as fault_process
from testing.forked_scripts import free_port, ranks, server
from testing.process import Order
from testing.tiny_base import save_tiny_base

ROOT = Path(__file__).resolve().parents[1]
STEPS = 6
# Seconds. A process that takes longer counts as hung, which is a failure.
PATIENCE = 300.0
COMMON = {
    "data.resolution": 64,
    "data.bucket_step": 32,
    # Few modules: creating them takes most of the start-up time, and all are saved and restored in the same way.
    "lora.targets": ["attn2.to_k"],
    "train.steps": STEPS,
    "checkpoint.every": 2,
    "checkpoint.keep": 2,
    "evaluation.every": 3,
    "evaluation.noise_samples": 4,
    "evaluation.drift_captions": ["a cat"],
    "sample.enabled": False,
    "tracking.wandb": "off",
}
# Everything that a step can depend on: 8-bit states (at a rank whose tensors are large enough), bf16, random numbers of every kind.
HARSH = {
    "train.precision": "bf16",
    "optimizer.name": "adamw8bit",
    "lora.rank": 128,
    "lora.alpha": 64.0,
    "lora.dropout": 0.3,
    "data.flip": 0.5,
    "loss.noise_offset": 0.1,
    "loss.snr_gamma": 5.0,
    "schedule.name": "cosine",
    "schedule.warmup": 2,
}
PLAIN = {"train.precision": "fp32", "optimizer.name": "adamw", "lora.rank": 4, "lora.alpha": 2.0}


@dataclass(frozen=True)
class Setup:
    """An architecture, a number of processes, and the run's settings. A step has four samples, in micro-batches of up to two."""

    architecture: str
    world: int
    harsh: bool

    @property
    def name(self) -> str:
        return f"{self.architecture}-{self.world}{'' if self.harsh else '-plain'}"

    @property
    def settings(self) -> dict[str, Any]:
        split = {"train.batch_size": 2, "train.accumulation": 2 // self.world}
        return COMMON | (HARSH if self.harsh else PLAIN) | split


SETUPS = {
    setup.name: setup
    for harsh in (True, False)
    for world in (1, 2)
    for architecture in ARCHITECTURES
    if (setup := Setup(architecture, world, harsh))
}


@dataclass
class Launch:
    """The processes of one launch of a run."""

    processes: list[BaseProcess]
    log: Path
    started: float = field(default_factory=time.monotonic)

    def wait(self, seconds: float = PATIENCE) -> list[int]:
        """Waits until all processes have ended and returns their exit statuses.

        As under a launcher, the other processes are killed (after a second) when one fails.
        """
        end = self.started + seconds
        while any(process.is_alive() for process in self.processes):
            failed = any(process.exitcode not in (None, 0) for process in self.processes)
            stopping = any(
                process.exitcode in (128 + signal.SIGTERM, 128 + signal.SIGINT) for process in self.processes
            )
            if failed and not stopping:
                time.sleep(1)
                self.kill()
            if time.monotonic() > end:
                self.kill()
                raise TimeoutError(f"the run hung; its log is {self.log}")
            time.sleep(0.01)
        return [process.exitcode for process in self.processes]

    def kill(self, first: int = 0) -> None:
        """Sends SIGKILL to all processes, starting with process `first`."""
        order = self.processes[first:] + self.processes[:first]
        for process in order:
            process.kill()
        for process in order:
            process.join()

    def text(self) -> str:
        """The output so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""


class Launcher:
    """The tests' folder with its bases and images, and the fork server that creates the processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._context = server()
        for name, count, seed in (("photos", 7, 0), ("held", 4, 1)):
            _make_images(folder / name, count, seed)

    def settings(self, setup: Setup, runs: Path | str, cache: Path | str, name: str = "run") -> dict[str, Any]:
        """The settings of a run, with its paths. Makes the tiny base if it is missing."""
        base = self.folder / f"base_{setup.architecture}"
        if not base.exists():
            save_tiny_base(base, setup.architecture)
        return setup.settings | {
            "model.base": str(base),
            "data.path": str(self.folder / "photos"),
            "evaluation.path": str(self.folder / "held"),
            "cache.folder": str(cache),
            "run.folder": str(runs),
            "run.name": name,
        }

    def start(self, setup: Setup, runs: Path, cache: Path, name: str = "run", **wrong: Any) -> Launch:
        """Starts the script of a setup.

        `wrong` are fields of `Order`; `die_at` and `count` apply to the main process only.
        """
        runs.mkdir(parents=True, exist_ok=True)
        order = Order(
            script=ROOT / script_of(setup),
            architecture=setup.architecture,
            settings=self.settings(setup, runs, cache, name),
            **{"log": runs.parent / f"{name}.log"} | wrong,
        )
        processes = []
        for rank, environment in enumerate(ranks(setup.world, free_port()) if setup.world > 1 else [{}]):
            mine = order if rank == 0 else replace(order, die_at=0, count=None)
            mine = replace(mine, environment=environment)
            processes.append(self._context.Process(target=fault_process.run, args=(mine,), daemon=True))
        for process in processes:
            process.start()
        return Launch(processes, order.log)


def script_of(setup: Setup) -> str:
    """The training script of a setup, relative to the repository."""
    return f"scripts/train_{setup.architecture}_lora.py"


def last_step(run: Path) -> int:
    """The last logged step, 0 before the first."""
    try:
        text = (run / "metrics.jsonl").read_text()
    except OSError:
        return 0
    return max((int(step) for step in re.findall(r'^\{"step": (\d+), "loss"', text, re.MULTILINE)), default=0)


def mount_tmpfs(folder: Path, options: str) -> bool:
    """Mounts a tmpfs at `folder`, or remounts the existing one with other options ("size=100000", "ro").

    Returns False if this is not permitted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    again = "remount," if os.path.ismount(folder) else ""
    try:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", again + options, "tmpfs", str(folder)], capture_output=True
        )
    except OSError:
        return False
    return done.returncode == 0


def unmount(folder: Path) -> None:
    subprocess.run(["umount", str(folder)], capture_output=True)


def _make_images(folder: Path, count: int, seed: int) -> None:
    """Writes small images of three shapes with captions."""
    folder.mkdir(parents=True)
    for number in range(count):
        rng = randomness.key(seed, "fault-injection-picture", number)
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        size = [(64, 64), (96, 64), (64, 96)][number % 3]
        coarse.resize(size, Image.Resampling.BICUBIC).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture {number} of fault injection {seed}\n")
