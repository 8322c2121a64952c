"""Checks this machine: torch and its GPU, precision, disk, caches, trackers, the hub, the launcher's config file, and versions.

    python scripts/doctor.py
    python scripts/doctor.py --config configs/sdxl_lora.yaml

Each line is ok, a note, or a problem with what to do. Nothing is written. With --config the folders, the base and the settings of
that file are checked. The exit status is 0, or 2 if there is a problem.
"""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

# With another Python than that of the installation, the imports below would end in a traceback.
if missing := [name for name in ("sushi_research", "pydantic", "psutil", "torch", "accelerate") if not find_spec(name)]:
    print(
        f"problem  installation  {sys.executable} does not have {', '.join(missing)}: activate the environment (source "
        ".venv/bin/activate, on Windows .venv\\Scripts\\activate), or install with `make setup` (README.md, Installing)"
    )
    raise SystemExit(2)

from sushi_research.config.arguments import Parser
from sushi_research.config.process import begin, run_main

if __name__ == "__main__":
    begin()
    PARSER = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    PARSER.add_argument("--config", action="append", default=[], metavar="FILE", help="a config of a training script")
    CONFIG = PARSER.parse_args()

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import psutil
import torch
from pydantic import TypeAdapter, ValidationError

from sushi_research import stopping
from sushi_research.config.inputs import CacheSection, ModelSection
from sushi_research.config.keys import allowed, keys_of
from sushi_research.config.learning import TrainSection
from sushi_research.config.outputs import RunSection, TrackingSection
from sushi_research.config.yaml12 import read_yaml, show
from sushi_research.errors import UserError, some
from sushi_research.files import size_text
from sushi_research.models.hub import hub_id
from sushi_research.models.hub_access import HubAccess, hub_cache, is_in_cache, is_offline
from sushi_research.precision import resolve_precision
from sushi_research.runs import installed, launch, machine, wandb_run
from sushi_research.runs.identity import flatten
from sushi_research.runs.launch_config import DefaultLaunch, default_launch
from sushi_research.terminal import say

ROOT = Path(__file__).resolve().parents[1]
OK, NOTE, PROBLEM = "ok", "note", "problem"
# Where a disk or a GPU has less, training may still work, so it is a note.
LITTLE_DISK, LITTLE_GPU = 10 * 2**30, 8 * 2**30
FOLDER_SECONDS = 0.5  # for the size of a folder

# The keys of a config that are checked here, with their sections.
SETTINGS = {
    "model.base": ModelSection,
    "train.precision": TrainSection,
    "run.folder": RunSection,
    "cache.folder": CacheSection,
    "tracking.wandb": TrackingSection,
}

Finding = tuple[str, str, str]  # OK, NOTE or PROBLEM; what was checked; what was found


def main(config: argparse.Namespace) -> int:
    """Prints a line for each check as soon as it is done. Returns 0, or 2 if one found a problem."""
    with stopping.doing("checking", "nothing is written; the same command again starts over"):
        settings = settings_of(config.config)
        hub = HubAccess()
        found = list(map(tell, checks(settings, hub)))
    return 2 if PROBLEM in found else 0


def tell(finding: Finding) -> str:
    state, what, text = finding
    say(f"{state:<9}{what:<14}{text}")
    return state


def settings_of(files: list[str]) -> dict[str, Any]:
    """The settings of SETTINGS by dotted key: those of the files, or the defaults. UserError for a value that is not valid."""
    given: dict[str, Any] = {}
    for file in files:
        given |= flatten(read_yaml(file))
    found = {}
    for key, section in SETTINGS.items():
        field = section.model_fields[key.rpartition(".")[2]]
        found[key] = None if field.is_required() else field.get_default()
        if key in given:
            try:
                found[key] = TypeAdapter(field.rebuild_annotation()).validate_python(given[key])
            except ValidationError:
                must = allowed(keys_of(section.model_json_schema()).leaves[key.rpartition(".")[2]])
                raise UserError(f"{key} is {show(given[key])} in {some(files)}: must be {must}.") from None
    return found


def checks(settings: dict[str, Any], hub: HubAccess) -> Iterator[Finding]:
    """All checks, the quick ones first."""
    yield check_versions()
    launcher = None
    try:
        launcher = default_launch()
        yield check_launcher(launcher)
    except UserError as error:
        yield PROBLEM, "accelerate", str(error)
    yield from check_devices()
    yield check_precision(settings["train.precision"], launcher)
    yield check_threads(launcher)
    yield from check_folders(settings)
    yield check_wandb(settings["tracking.wandb"])
    yield from check_hub(settings["model.base"], hub)


def check_versions() -> Finding:
    """The libraries of pyproject.toml, and their tested versions."""
    found = installed.compare(ROOT)
    install = "`make setup`, or `pip install --constraint constraints.txt --editable .`, installs the tested versions"
    if found.wrong:
        return PROBLEM, "versions", f"{some(found.wrong)}: {install}"
    if found.untested:
        return NOTE, "versions", f"{some(found.untested)}: they should work; {install}"
    return OK, "versions", f"the {found.needed} libraries have the versions of constraints.txt"


def check_launcher(launcher: DefaultLaunch) -> Finding:
    """What `accelerate launch` without options would ask for, and whether the scripts refuse it."""
    where = launcher.file or "no config file"
    advice = "or run `accelerate config` again, or start the script with python"
    try:
        launch.require_launch(launcher.environment)
        resolve_precision("auto", launcher.environment.get("ACCELERATE_MIXED_PRECISION"), torch.device("cpu"))
    except UserError as error:
        return PROBLEM, "accelerate", f"{where}: {str(error).rstrip('.')}; {advice}"
    count = "1 process" if launcher.processes == 1 else f"{launcher.processes} processes"
    precision = launcher.environment["ACCELERATE_MIXED_PRECISION"]
    return OK, "accelerate", f"{where}: `accelerate launch` starts {count}, mixed precision {precision}"


def check_devices() -> Iterator[Finding]:
    """The build of torch, and each GPU with its memory."""
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    is_cpu_build = torch.version.cuda is None and torch.version.hip is None
    yield OK, "torch", f"{torch.__version__} ({'for CPUs' if is_cpu_build else build})"
    if not torch.cuda.is_available():
        # Training on the CPU takes a hundred times longer; whoever hides the GPU with CUDA_VISIBLE_DEVICES knows that.
        unused = driver_shows_gpu() and "CUDA_VISIBLE_DEVICES" not in os.environ
        yield (PROBLEM if unused else NOTE), "GPU", f"none is used: {machine.why_no_gpu()}"
        memory = psutil.virtual_memory()
        free = f"{size_text(memory.available)} of {size_text(memory.total)} memory are free"
        yield OK, "CPU", f"{machine.device_name('cpu')}; {free}"
        return
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        text = f"{machine.device_name(f'cuda:{number}')}; {size_text(free)} of {size_text(total)} are free"
        if total < LITTLE_GPU:
            yield NOTE, f"GPU {number}", f"{text}: add --config configs/overlays/8gb.yaml"
        elif free < total / 2:
            yield NOTE, f"GPU {number}", f"{text}: close other programs that use it"
        else:
            yield OK, f"GPU {number}", text


def driver_shows_gpu() -> bool:
    """Whether NVIDIA's driver is installed and lists a GPU."""
    try:
        listed = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=2, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.stdout.startswith("GPU ")


def check_precision(configured: str, launcher: DefaultLaunch | None) -> Finding:
    """What train.precision becomes here, with and without the launcher."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = resolve_precision(configured, os.environ.get("ACCELERATE_MIXED_PRECISION"), device)
        text = f"{found.name} ({found.reason})"
        if launcher:
            launched = resolve_precision(configured, launcher.environment.get("ACCELERATE_MIXED_PRECISION"), device)
            if launched.name != found.name:
                return NOTE, "precision", f"{text}; but {launched.name} under `accelerate launch` ({launched.reason})"
    except UserError as error:
        return PROBLEM, "precision", str(error)
    return OK, "precision", text


def check_threads(launcher: DefaultLaunch | None) -> Finding:
    """torch's threads, which matter where it trains on a CPU."""
    cores, threads = os.cpu_count() or 1, torch.get_num_threads()
    asked = os.environ.get("OMP_NUM_THREADS")
    if asked is not None and not (asked.isdecimal() and int(asked) > 0):
        return (
            PROBLEM,
            "threads",
            f"OMP_NUM_THREADS is {asked!r}: give a number of threads, such as {cores}, or unset it",
        )
    launched = launcher.environment.get("OMP_NUM_THREADS", str(threads)) if launcher else str(threads)
    other = f"; {launched} under `accelerate launch`, unless OMP_NUM_THREADS is set" if launched != str(threads) else ""
    if threads > cores:
        return NOTE, "threads", f"{threads} for {cores} cores{other}: fewer are faster (OMP_NUM_THREADS={cores})"
    return OK, "threads", f"{threads} of {cores} cores{other}"


def check_folders(settings: dict[str, Any]) -> Iterator[Finding]:
    """The disks of the run and cache folders, and how large the caches are."""
    for key in ("run.folder", "cache.folder"):
        folder = Path(settings[key]).absolute()
        existing = next(path for path in (folder, *folder.parents) if path.is_dir() or path == path.parent)
        if folder.exists() and not folder.is_dir():
            yield PROBLEM, key, f"{folder} is no folder: move it away, or give --{key} another place"
            continue
        if not os.access(existing, os.W_OK | os.X_OK):
            yield PROBLEM, key, f"{existing} cannot be written: make it writable, or give --{key} another place"
            continue
        free = shutil.disk_usage(existing).free
        size = f"{folder_size(folder)} in it, " if key == "cache.folder" and folder.is_dir() else ""
        text = f"{folder}: {size}{size_text(free)} free on its disk"
        little = f" (a checkpoint and the cache of some hundred images take a few GiB; --{key} gives another place)"
        yield (NOTE, key, text + little) if free < LITTLE_DISK else (OK, key, text)
    hub = hub_cache()
    size = folder_size(hub) if hub.is_dir() else "nothing yet"
    yield (
        OK,
        "hub cache",
        f"{hub}: {size} (models from the hub; HF_HUB_CACHE gives another place, `hf cache` cleans it)",
    )


def folder_size(folder: Path) -> str:
    """The size of the files below a folder; what is counted by the time limit if it has very many. Links do not count."""
    until, total = time.monotonic() + FOLDER_SECONDS, 0
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                found = os.lstat(os.path.join(path, name))
            except OSError:
                continue  # it was removed just now
            total += found.st_size
        if time.monotonic() > until:
            return f"more than {size_text(total)}"
    return size_text(total)


def check_wandb(setting: str) -> Finding:
    """What `tracking.wandb` becomes here."""
    try:
        mode, notice = wandb_run.resolve_mode(setting)
    except UserError as error:
        return PROBLEM, "W&B", str(error)
    unusable = setting != "off" and mode is None and "because" in notice
    return (NOTE if unusable else OK), "W&B", notice.removeprefix("W&B: ")


def check_hub(base: str | None, access: HubAccess) -> Iterator[Finding]:
    """Whether there is a base of this name, whether models can be fetched, and whether that is necessary for the base."""
    from huggingface_hub import get_token

    found = None
    try:
        found = None if base is None else hub_id(base, "model.base")
    except UserError as error:
        yield PROBLEM, "model.base", str(error).removeprefix("model.base: ").rstrip(".")
    problem = access.problem()
    if problem is None:
        login = "logged in" if get_token() else "not logged in (only gated models need it: `hf auth login`)"
        yield OK, "hub", f"reachable; {login}"
    elif found and not is_in_cache(found[0]):
        yield (
            PROBLEM,
            "hub",
            f"{problem}; model.base {base} is not in the hub cache: fetch it first, with a connection",
        )
    else:
        yield (OK if is_offline() else NOTE), "hub", problem


if __name__ == "__main__":
    run_main(main, CONFIG)
