"""Provenance of a run: code, library versions, machine and inputs, with one entry per launch."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sushi_research
from sushi_research.config.yaml12 import show
from sushi_research.files import write_json
from sushi_research.randomness import SCHEME
from sushi_research.runs import machine, records
from sushi_research.runs.code import changed_files, is_recorded, listed

# The libraries that affect what is learned.
ARITHMETIC = ("torch", "diffusers", "transformers", "peft", "bitsandbytes", "numpy", "accelerate")

_MAY_DIFFER = "; the result may differ from an uninterrupted run's"


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
    code: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The provenance entry of a launch, as JSON values.

    `config` is the resolved config; `config_hash` is the hash of the run's identity (None if nothing is trained); `split`
    describes the held-out images; `validation_set` is the hash of the validation set, `recipe` that of how data is processed;
    `base_hashes` is by component; `device` is that of this process ("cpu", "cuda:0"); `world` is the number of processes;
    `code` is that of `code.code_of`.
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
        "code": {"version": sushi_research.__version__, **git_state(), **(code or {})},
        "python": platform.python_version(),
        "libraries": machine.library_versions(),
        "platform": platform.platform(),
        "device": machine.device_name(device),
        "machine": machine.hardware(device),
        "precision": precision,
        "world": world,
        "resolved_config": config,
    }


def facts(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry for W&B's config: without the config, which W&B stores separately, and without the table of code files."""
    found = {key: value for key, value in entry.items() if key != "resolved_config"}
    return found | {"code": {key: value for key, value in entry["code"].items() if key not in ("files", "named")}}


def entries(path: Path, remedy: str = "restore or remove it, then run the command again") -> list[dict[str, Any]]:
    """The entries of a provenance.json; empty if there is no file. UserError, which ends with `remedy`, if it is damaged."""
    return records.read_as(path, records.ENTRIES, remedy) if os.path.lexists(path) else []


def add_entry(path: Path, entry: dict[str, Any]) -> None:
    """Appends `entry` to the list in provenance.json. A resumed run keeps the entries of its earlier launches."""
    write_json(path, [*entries(path), entry])


def replace_last(path: Path, entry: dict[str, Any]) -> None:
    """Puts `entry` in the place of the last one in provenance.json, which is this launch's."""
    write_json(path, [*entries(path)[:-1], entry])


def step_path(entry: dict[str, Any]) -> str:
    """How a launch ran its steps: "recorded" as CUDA graphs, or "eager", as earlier versions did."""
    return entry.get("step_path") or "eager"


def launches(found: Sequence[dict[str, Any]], step: int | None = None) -> list[dict[str, Any]]:
    """The entries of those launches that contributed to the run as it is at `step`, or at its end.

    A launch that went on from an earlier step than a launch before it, or from the same one, replaced that launch's steps. An
    entry without a step counts.
    """
    kept: list[dict[str, Any]] = []
    for entry in [*found, *([] if step is None else [{"step": step}])]:
        while kept and all(isinstance(each.get("step"), int) for each in (entry, kept[-1])):
            if kept[-1]["step"] < entry["step"]:
                break
            kept.pop()
        kept.append(entry)
    return kept if step is None else kept[:-1]


def changes(before: dict[str, Any] | None, now: dict[str, Any]) -> list[str]:
    """A sentence for each difference between two launches, outside the config, that may change the numerical result."""
    if before is None:
        return []
    found = []
    was, code = before.get("code") or {}, now["code"]
    if is_recorded(was) and is_recorded(code):
        if files := changed_files(was, code):
            found.append(f"the code has changed in {listed(files)}")
    elif (was.get("version"), was.get("commit")) != (code["version"], code["commit"]):
        found.append(f"the code was {_code(was)} and is {_code(code)}")
    elif was.get("dirty") or code["dirty"]:
        found.append(f"the code differs from its commit {str(code['commit'])[:10]}, and the changes are not recorded")
    libraries = before.get("libraries") or {}
    moved = [
        f"{name} {libraries.get(name)} -> {version}"
        for name, version in now["libraries"].items()
        if name in ARITHMETIC and libraries.get(name) != version
    ]
    if moved:
        found.append(f"library versions have changed: {', '.join(moved)}")
    for key, what in (("device", "the device"), ("world", "the number of processes")):
        if before.get(key) != now[key]:
            found.append(f"{what} was {before.get(key)} and is {now[key]}")
    attention = [((each.get("resolved_config") or {}).get("train") or {}).get("attention") for each in (before, now)]
    if None not in attention and attention[0] != attention[1]:
        found.append(f"train.attention was {show(attention[0])} and is {show(attention[1])}")
    return [f"{sentence}{_MAY_DIFFER}" for sentence in found]


def path_changes(before: dict[str, Any] | None, path: str) -> list[str]:
    """A sentence if the launch before ran its steps in another way than by `path`."""
    if before is None or step_path(before) == path:
        return []
    return [f"the step was {step_path(before)} and is {path}{_MAY_DIFFER}"]


def _code(code: dict[str, Any]) -> str:
    return str(code.get("commit") or code.get("version"))[:10] + (" with changes" if code.get("dirty") else "")


def git_state(root: Path = Path(sushi_research.__file__).parents[1]) -> dict[str, Any]:
    """`{"commit": ..., "dirty": ...}` of the checkout that this code runs from; both None if there is no checkout.

    Dirty means that a tracked file differs from the commit. A repository that merely contains `root` does not count, for
    example that of another project with the virtual environment in which this package is installed.
    """
    top = _git(root, "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != root.resolve():
        return {"commit": None, "dirty": None}
    changes = _git(root, "status", "--porcelain", "--untracked-files=no")
    return {"commit": _git(root, "rev-parse", "--verify", "HEAD"), "dirty": None if changes is None else changes != ""}


def _git(root: Path, *arguments: str) -> str | None:
    """The output of git; None if git is not installed, cannot be started or fails."""
    # In a git hook of another repository these variables point to that repository.
    elsewhere = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")
    environment = {key: value for key, value in os.environ.items() if key not in elsewhere}
    # Without its lock git does not write the index: a run never stands in the way of a commit that is made meanwhile.
    command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
