"""Where a result comes from: code, library versions, machine and inputs, one entry per start of the run."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import sushi_research
from sushi_research.errors import UserError
from sushi_research.files import write_json
from sushi_research.randomness import SCHEME

LIBRARIES = (
    "torch",
    "accelerate",
    "diffusers",
    "transformers",
    "peft",
    "bitsandbytes",
    "datasets",
    "safetensors",
    "numpy",
    "pillow",
    "wandb",
)


def collect(
    *, config_hash: str, dataset_hash: str, base_hashes: dict[str, str], device: str, world: int, step: int
) -> dict[str, Any]:
    """What a start of the run was made of, as JSON values.

    `base_hashes` by component, `device` as the process trains on it ("cpu", "cuda:0"), `world` the number of
    processes, `step` where this start begins: 0, or the checkpoint's step.
    """
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "step": step,
        "config": config_hash,
        "dataset": dataset_hash,
        "base": base_hashes,
        "random_scheme": SCHEME,
        "code": {"version": sushi_research.__version__, **git_state()},
        "python": platform.python_version(),
        "libraries": library_versions(),
        "platform": platform.platform(),
        "device": device_name(device),
        "world": world,
    }


def add_entry(path: Path, entry: dict[str, Any]) -> None:
    """Append `entry` to the list in provenance.json: a run that goes on keeps what its earlier starts were made of."""
    entries = []
    if path.exists():
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(
                f"{path} is not JSON ({error}): restore or remove it, then run the command again"
            ) from error
    write_json(path, [*entries, entry])


def git_state(root: Path = Path(sushi_research.__file__).parents[1]) -> dict[str, Any]:
    """`{"commit": ..., "dirty": ...}` of the checkout that this code runs from; None for both where it is none.

    Dirty means that a tracked file differs from the commit. A repository that merely encloses `root`, as when
    the package is installed into a virtual environment inside another project, is not this code's.
    """
    top = _git(root, "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != root.resolve():
        return {"commit": None, "dirty": None}
    changes = _git(root, "status", "--porcelain", "--untracked-files=no")
    return {"commit": _git(root, "rev-parse", "--verify", "HEAD"), "dirty": None if changes is None else changes != ""}


def library_versions() -> dict[str, str | None]:
    """Installed versions by name, read without importing anything; None for what is not installed."""
    found: dict[str, str | None] = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def device_name(device: str) -> str:
    """The name of the GPU, or of the CPU, that `device` means."""
    if device != "cpu":
        import torch

        if device.startswith("cuda"):
            return torch.cuda.get_device_name(device)
        return device
    cpuinfo = Path("/proc/cpuinfo")  # platform.processor() is empty on most Linux systems
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git(root: Path, *arguments: str) -> str | None:
    """What git prints; None where git is not installed or refuses."""
    # Within a hook of another repository these point there.
    elsewhere = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")
    environment = {key: value for key, value in os.environ.items() if key not in elsewhere}
    command = ["git", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
