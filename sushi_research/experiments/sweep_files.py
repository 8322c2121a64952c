"""Sweep files of W&B, read as experiments: the same search space and the same runs, without W&B's server.

https://docs.wandb.ai/models/sweeps/sweep-config-keys has their format. There is no `bayes`, and nothing is terminated early.
`written_sweep.py` writes them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sushi_research.config.yaml12 import read_yaml
from sushi_research.errors import UserError
from sushi_research.experiments import search_space

SEED = "train.seed"
FOLDER = "runs/experiments"
# The keys of a sweep file that say what is run; those that only W&B's server and pages use.
READ = ("program", "parameters", "method", "command", "name", "run_cap")
UNUSED = ("metric", "description", "project", "entity", "controller")


def read_experiment(file: str) -> dict[str, Any]:
    """The content of an experiment file; of a sweep file (one with `program` and `parameters`), what it says as an experiment.

    `title`, `script`, `configs`, `settings`, `folder` and `grid` or `search`; `seeds` if train.seed is a parameter, and `samples`
    if there is a run_cap. UserError for a sweep that is none of ours.
    """
    content = read_yaml(file)
    if not {"program", "parameters"} <= content.keys():
        return content
    parameters, method = content["parameters"], content.get("method")
    if method not in ("grid", "random"):
        raise UserError(
            f"method is {method!r} in {file}: without W&B's server a sweep can be grid or random; random draws from the same "
            "parameters."
        )
    if not isinstance(parameters, dict) or not isinstance(content["program"], str):
        raise UserError(f"{file} is no sweep of W&B: program is a script, and parameters a mapping.")
    if "early_terminate" in content:
        raise UserError(
            f"{file} has early_terminate, and without W&B's server every run is trained to its end: remove it in a copy of the "
            "file."
        )
    if unknown := [str(key) for key in content if key not in (*READ, *UNUSED)]:
        raise UserError(
            f"{file} has the key {unknown[0]}, which is not known of a sweep: it has {', '.join((*READ, *UNUSED))}."
        )
    flat = dict(_flat(parameters))
    launch, configs, settings = _of_command(content.get("command"), file)
    for key, parameter in list(flat.items()):
        if search_space.distribution_of(key, parameter) == "constant":
            settings[key] = flat.pop(key)["value"]
    found = {
        "title": content.get("name") or Path(file).stem.replace("_", " "),
        "script": content["program"],
        "configs": configs,
        "folder": f"{FOLDER}/{Path(file).stem}",
        **({"launch": launch} if launch else {}),
    }
    if SEED in flat:
        found["seeds"] = _values(SEED, flat.pop(SEED), file)
    elif SEED in settings:  # one for all
        seed = settings.pop(SEED)
        found["seeds"] = [int(seed) if isinstance(seed, str) and seed.isdecimal() else seed]
    cap, seeds = content.get("run_cap"), len(found.get("seeds", [0]))
    if cap is not None and (type(cap) is not int or cap < 1):
        raise UserError(f"run_cap is {cap!r} in {file}: it must be a whole number above 0.")
    if not flat:  # repeats of one run
        found["variants"] = {"run": {}}
    elif method == "grid":
        values = {key: _values(key, parameter, file) for key, parameter in flat.items()}
        found["grid"] = nested(values)
        if cap is not None and cap < (runs := seeds * math.prod(map(len, values.values()))):
            raise UserError(f"{file} is a grid of {runs} runs with the run_cap {cap}: remove it, or give fewer values.")
    else:
        found["search"] = nested(flat)
        if cap is not None:
            found["samples"] = max(1, cap // seeds)
    return found | {"settings": nested(settings)}


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as sections: {"lora.rank": 4} is {"lora": {"rank": 4}}."""
    found: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, name = key.split(".")
        part = found
        for section in sections:
            part = part.setdefault(section, {})
            if not isinstance(part, dict):
                raise UserError(f"{key} and {section} are both set, and one is within the other: remove one of them.")
        part[name] = value
    return found


def _flat(parameters: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, parameter); W&B nests them under `parameters`."""
    for name, parameter in parameters.items():
        inner = parameter.get("parameters") if isinstance(parameter, dict) else None
        if isinstance(inner, dict):
            yield from _flat(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", parameter


def _values(key: str, parameter: Mapping[str, Any], file: str) -> list[Any]:
    """All values of a parameter of a grid."""
    name = search_space.distribution_of(key, parameter)
    if name == "categorical":
        return parameter["values"]
    if name == "int_uniform" and parameter["max"] - parameter["min"] < search_space.MOST_VALUES:
        return list(range(parameter["min"], parameter["max"] + 1))
    raise UserError(f"{key} in {file} has no list of values, which a grid and {SEED} need: give values.")


def _of_command(command: Any, file: str) -> tuple[list[str], list[str], dict[str, Any]]:
    """(arguments of accelerate launch, config files, settings by dotted key) of a sweep's command."""
    if not isinstance(command, list) or not all(isinstance(word, str) for word in command):
        raise UserError(f"{file} has no command: write it as configs/sweeps/sdxl_rank.yaml does, with its --config.")
    if "${program}" not in command:
        raise UserError(f"the command in {file} has no ${{program}}: write it as configs/sweeps/sdxl_rank.yaml does.")
    place = command.index("${program}")
    before, words = command[:place], [word for word in command[place + 1 :] if not word.startswith("${args")]
    launch = before[before.index("launch") + 1 :] if "launch" in before else []
    configs, settings = [], {}
    while words:
        name, equals, text = words.pop(0).removeprefix("--").partition("=")
        if not equals and not words:
            raise UserError(f"--{name} in the command in {file} has no value: give it as --{name}=VALUE.")
        text = text if equals else words.pop(0)
        if name == "config":
            configs.append(text)
        else:
            settings[name] = text
    return launch, configs, settings
