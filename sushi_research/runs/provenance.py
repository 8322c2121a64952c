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

import psutil

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
# Those that compute what is learned.
ARITHMETIC = ("torch", "diffusers", "transformers", "peft", "bitsandbytes", "numpy", "accelerate")


def collect(
    *,
    config: dict[str, Any],
    config_hash: str | None,
    dataset_hash: str,
    split: dict[str, Any],
    validation_set: str | None,
    recipe: str,
    base_hashes: dict[str, str],
    precision: str,
    device: str,
    world: int,
) -> dict[str, Any]:
    """What a start of the run is made of, as JSON values.

    `config` is the resolved one, `config_hash` that of the run's identity (None where nothing is trained); `split` says what is
    held out, `validation_set` is the hash of the validation set, `recipe` of how data is encoded; `base_hashes` by component,
    `device` as the process trains on it ("cpu", "cuda:0"), `world` the number of processes.
    """
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "config": config_hash,
        "dataset": dataset_hash,
        "split": split,
        "validation_set": validation_set,
        "recipe": recipe,
        "base": base_hashes,
        "random_scheme": SCHEME,
        "code": {"version": sushi_research.__version__, **git_state()},
        "python": platform.python_version(),
        "libraries": library_versions(),
        "platform": platform.platform(),
        "device": device_name(device),
        "machine": machine(device),
        "precision": precision,
        "world": world,
        "resolved_config": config,
    }


def machine(device: str) -> dict[str, Any]:
    """Cores, and memory in GiB: the machine's, and its GPU's where there is one."""
    gpu = None
    if device.startswith("cuda"):
        import torch

        gpu = round(torch.cuda.get_device_properties(device).total_memory / 2**30, 1)
    memory = round(psutil.virtual_memory().total / 2**30, 1)
    return {"cpus": os.cpu_count(), "memory_gib": memory, "gpu_memory_gib": gpu}


def facts(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry without the config, which stands next to it in W&B."""
    return {key: value for key, value in entry.items() if key != "resolved_config"}


def entries(path: Path) -> list[dict[str, Any]]:
    """The entries of a provenance.json, none where there is no file. UserError where it is damaged."""
    if not path.exists():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is not JSON ({error}): restore or remove it, then run the command again") from error
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise UserError(f"{path} is no list of starts: restore or remove it, then run the command again")
    return found


def last_entry(path: Path) -> dict[str, Any] | None:
    """How the run was last started; None where that is not on record."""
    found = entries(path)
    return found[-1] if found else None


def add_entry(path: Path, entry: dict[str, Any]) -> None:
    """Append `entry` to the list in provenance.json: a run that goes on keeps what its earlier starts were made of."""
    write_json(path, [*entries(path), entry])


def changes(before: dict[str, Any] | None, now: dict[str, Any]) -> list[str]:
    """A sentence for each thing outside the config that differs between two starts and may change the last bits, or more."""
    if before is None:
        return []
    found = []
    was, code = before.get("code") or {}, now["code"]
    if (was.get("version"), was.get("commit")) != (code["version"], code["commit"]):
        found.append(f"the code was {_code(was)} and is {_code(code)}")
    elif was.get("dirty") or code["dirty"]:
        found.append(f"the code differs from its commit {_code(code)}, in what way is not on record")
    libraries = before.get("libraries") or {}
    moved = [
        f"{name} {libraries.get(name)} -> {version}"
        for name, version in now["libraries"].items()
        if name in ARITHMETIC and libraries.get(name) != version
    ]
    if moved:
        found.append(f"other library versions: {', '.join(moved)}")
    for key, what in (("device", "the device"), ("world", "the number of processes")):
        if before.get(key) != now[key]:
            found.append(f"{what} was {before.get(key)} and is {now[key]}")
    return [f"{sentence}; the result may differ from an uninterrupted run's" for sentence in found]


def _code(code: dict[str, Any]) -> str:
    return str(code.get("commit") or code.get("version"))[:10] + (" with changes" if code.get("dirty") else "")


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
