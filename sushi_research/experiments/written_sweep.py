"""An experiment written as a sweep of W&B: the same search space, seeds and command."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import yaml

from sushi_research.config.yaml12 import parse_yaml
from sushi_research.errors import UserError
from sushi_research.experiments import search_space, sweep_files
from sushi_research.experiments.experiment_file import Experiment
from sushi_research.runs import identity

METRIC = {"name": "evaluation/loss_over_base", "goal": "minimize"}


def sweep_of(experiment: Experiment) -> dict[str, Any]:
    """The sweep of W&B with the same search space, seeds and command. UserError if it has named variants, which a sweep has not.

    A random sweep draws its seed too, and every number by W&B's own generator, so its draws are others than the experiment's.
    """
    if experiment.variants:
        raise UserError(
            "variants have names and settings of their own, which a sweep of W&B has not: write them as a grid or a search."
        )
    if experiment.grid:
        parameters = {key: {"values": _written(values)} for key, values in identity.flatten(experiment.grid).items()}
    else:
        parameters = {key: _parameter(key, each) for key, each in search_space.leaves(experiment.search)}
    parameters[sweep_files.SEED] = {"values": list(experiment.seeds)}
    words = [word for config in experiment.configs for word in ("--config", config)]
    for key, value in identity.flatten(experiment.settings).items():
        if key not in parameters:  # which take its place
            words.append(f"--{key}={value if isinstance(value, str) else json.dumps(value)}")
    cap = {} if experiment.samples is None else {"run_cap": experiment.samples * len(experiment.seeds)}
    return {
        "name": experiment.title,
        "program": experiment.script,
        "method": "grid" if experiment.grid else "random",
        **cap,
        "metric": METRIC,
        "parameters": parameters,
        "command": ["accelerate", "launch", *experiment.launch, "${program}", *words, "${args}"],
    }


def _parameter(key: str, parameter: Any) -> dict[str, Any]:
    """A parameter as W&B's agent passes it on."""
    search_space.distribution_of(key, parameter)
    values = {name: _written(parameter[name]) for name in ("values",) if name in parameter}
    if "value" in parameter:
        values["value"] = _written([parameter["value"]])[0]
    return {**parameter, **values}


def _written(values: Sequence[Any]) -> list[Any]:
    """Values of which W&B's agent makes words that are read as these values: it writes null as None, and a list as Python does."""
    return [value if type(value) in (bool, int, float, str) else json.dumps(value) for value in values]


class _Dumper(yaml.SafeDumper):
    """Quotes what YAML 1.2, as our own reader has it, would take for a number or break elsewhere: "1e3", "+.5"."""


def _text(dumper: _Dumper, text: str) -> yaml.Node:
    is_plain = not text[:1].isdigit() and text[:1] not in ("+", "-", ".") and text.splitlines() in ([], [text])
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if is_plain else '"')


_Dumper.add_representer(str, _text)


def text_of(experiment: Experiment) -> str:
    """The sweep of an experiment as YAML, with how it is started."""
    sweep = sweep_of(experiment)
    # W&B reads YAML 1.1, in which 1e-05 is a text and off is false.
    text = yaml.dump(sweep, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**6)
    assert parse_yaml(text, "the sweep") == yaml.safe_load(text) == sweep
    head = "# Written by scripts/run_experiment.py. wandb sweep FILE prints the sweep's id; wandb agent TEAM/PROJECT/ID runs it.\n"
    return head + text
