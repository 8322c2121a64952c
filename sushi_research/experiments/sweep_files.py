"""Sweep files of W&B, read as experiments: the same search space and the same runs, without W&B's server.

https://docs.wandb.ai/models/sweeps/sweep-config-keys has their format. There is no `bayes`, and nothing is terminated early.
`written_sweep.py` writes them.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sushi_research.config import TrainingConfig
from sushi_research.config.keys import default_values
from sushi_research.config.yaml12 import read_yaml
from sushi_research.errors import UserError
from sushi_research.experiments import search_space

SEED = "train.seed"
FOLDER = "runs/experiments"
# The keys of a sweep file that say what is run; those that only W&B's server and pages use.
READ = ("program", "parameters", "method", "command", "name", "run_cap")
UNUSED = ("metric", "description", "project", "entity", "controller")
# What W&B's agent puts into a command: the parameters as words, and variables of the environment.
ARGUMENTS = ("${args}", "${args_no_boolean_flags}")
_VARIABLE = re.compile(r"\$\{envvar:([A-Z0-9_]*)\}")


def read_experiment(file: str) -> dict[str, Any]:
    """The content of an experiment file; of a sweep file (one with `program` and `parameters`), what it says as an experiment.

    `title`, `script`, `configs`, `settings`, `folder`, `seeds` and `grid` or `search`; `samples` if there is a run_cap. A variant
    with nothing after its name is one without settings. UserError for a sweep that is none of ours.
    """
    content = read_yaml(file)
    if not {"program", "parameters"} <= content.keys():
        variants = content.get("variants")
        if isinstance(variants, dict):
            variants = {name: {} if settings is None else settings for name, settings in variants.items()}
            return content | {"variants": variants}
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
    if twice := [key for key in flat if key in settings]:
        raise UserError(f"{twice[0]} is a parameter and in the command in {file}: remove it from one of them.")
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
    else:
        found["seeds"] = [_seed_of(configs)]
    cap, seeds = content.get("run_cap"), len(found["seeds"])
    if cap is not None and (type(cap) is not int or cap < 1):
        raise UserError(f"run_cap is {cap!r} in {file}: it must be a whole number above 0.")
    if cap is not None and cap < seeds:
        raise UserError(f"{file} has {seeds} seeds and the run_cap {cap}: remove it, or give fewer values of {SEED}.")
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


def _seed_of(configs: Sequence[str]) -> Any:
    """The seed of a run with these config files: that of the last one that has one, else the default."""
    sections = [read_yaml(config).get("train") for config in configs]
    seeds = [section["seed"] for section in sections if isinstance(section, dict) and "seed" in section]
    return seeds[-1] if seeds else default_values(TrainingConfig)[SEED]


def _of_command(command: Any, file: str) -> tuple[list[str], list[str], dict[str, Any]]:
    """(arguments of accelerate launch, config files, settings by dotted key) of a sweep's command."""
    where, example = f"the command in {file}", "write it as configs/sweeps/sdxl_rank.yaml does"
    if not isinstance(command, list) or not all(isinstance(word, str) for word in command):
        raise UserError(f"{file} has no command: {example}, with its --config.")
    if "${program}" not in command:
        raise UserError(f"{where} has no ${{program}}: {example}.")
    if not any(word in ARGUMENTS for word in command):
        raise UserError(f"{where} has no ${{args}}, so that no run would get its parameters: {example}.")
    command = [_VARIABLE.sub(lambda variable: _of_environment(variable[1], where), word) for word in command]
    place = command.index("${program}")
    before, words = command[:place], [word for word in command[place + 1 :] if word not in ARGUMENTS]
    launch = before[before.index("launch") + 1 :] if "launch" in before else []
    if unknown := [word for word in (*launch, *words) if word.startswith("${") and word.endswith("}")]:
        raise UserError(f"{where} has {unknown[0]}, which the scripts of this suite do not take: {example}.")
    configs, settings = [], {}
    while words:
        word = words.pop(0)
        name, equals, text = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            raise UserError(f"{where} has the word {word}, which is no setting: give it as --section.key=VALUE.")
        if not equals and not words:
            raise UserError(f"--{name} in {where} has no value: give it as --{name}=VALUE.")
        text = text if equals else words.pop(0)
        if name == "config":
            configs.append(text)
        elif name in settings:
            raise UserError(f"--{name} is given twice in {where}: keep one.")
        else:
            settings[name] = text
    return launch, configs, settings


def _of_environment(variable: str, where: str) -> str:
    """The value of a variable of the environment. UserError if it is not set: W&B would put its name there."""
    if variable not in os.environ:
        raise UserError(
            f"{where} has ${{envvar:{variable}}}, and {variable} is not set in the environment: set it, or write the value there."
        )
    return os.environ[variable]
