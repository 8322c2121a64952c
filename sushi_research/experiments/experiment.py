"""The runs of an experiment: their names, command lines and configs, and how each stands."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sushi_research.config import TrainingConfig
from sushi_research.config.command_line import config_to_dict, load_config
from sushi_research.config.keys import default_values
from sushi_research.config.yaml12 import read_yaml
from sushi_research.errors import UserError
from sushi_research.experiments import scoring, search_space
from sushi_research.experiments.experiment_file import Experiment
from sushi_research.experiments.script import config_class_of, find_script
from sushi_research.runs import code, identity, provenance, records
from sushi_research.runs.run_folder import RunFolder
from sushi_research.training.length import steps_of

# Settings whose resolved value is a fact of the run's identity.
COVERED = ("train.precision", "model.prediction_type", "model.zero_terminal_snr", "model.flow_shift")
# Of one experiment. Every run is trained, and its config is read before the first one starts.
MOST_RUNS = 1000


@dataclass(frozen=True)
class Planned:
    """One run of an experiment. `arguments` are the training script's."""

    script: Path
    name: str
    variant: str
    seed: int
    arguments: list[str]
    config: TrainingConfig

    @property
    def folder(self) -> Path:
        return Path(self.config.run.folder) / self.name


def plan(experiment: Experiment) -> list[Planned]:
    """The runs, seed by seed, so that an unfinished experiment has every variant. UserError for an invalid config."""
    named = list(itertools.islice(variants_of(experiment), MOST_RUNS + 1))
    if len(named) * len(experiment.seeds) > MOST_RUNS:
        raise UserError(
            f"the variants and seeds make more than {MOST_RUNS} runs: take fewer values in grid, variants, samples or seeds."
        )
    keys = [name.casefold() for name, _ in named]
    if twice := [name for name, _ in named if keys.count(name.casefold()) > 1]:
        raise UserError(
            f"two variants would share the folder {twice[0]} (characters other than letters and digits become - in the names of a "
            "grid, and some file systems ignore case): give the variants names of their own under variants."
        )
    variants = dict(named)
    if experiment.reference is not None and experiment.reference not in variants:
        raise UserError(
            f"reference is {experiment.reference}, but the variants are {', '.join(variants)}: name one of them."
        )
    script, planned = find_script(experiment.script), []
    config_class = config_class_of(script)
    for seed, (variant, settings) in itertools.product(experiment.seeds, variants.items()):
        name = f"{variant}-seed{seed}"
        flat = identity.flatten(experiment.settings) | settings
        flat |= {"train.seed": seed, "run.folder": experiment.folder, "run.name": name}
        arguments = [word for config in experiment.configs for word in ("--config", config)]
        arguments += [f"--{key}={written(value)}" for key, value in flat.items()]
        try:
            config = load_config(config_class, arguments, script=experiment.script, intro="\n".join("12345"))
        except UserError as error:
            raise UserError(f"the variant {variant}: {str(error).strip()}") from None
        planned.append(Planned(script, name, variant, seed, arguments, config))
    return planned


def variants_of(experiment: Experiment) -> search_space.Variants:
    """(name, flattened settings) of each variant: those named, then every combination of the grid or the draws of the search.

    UserError for what is neither.
    """
    for name, settings in experiment.variants.items():
        yield name, identity.flatten(settings)
    if experiment.grid:
        yield from search_space.grid_of(identity.flatten(experiment.grid))
    if experiment.search:
        yield from search_space.draws_of(experiment.search, experiment.samples, experiment.search_seed)


def written(value: Any) -> str:
    """A value in the form of the command line: text unchanged, anything else as JSON, which is valid YAML."""
    return value if isinstance(value, str) else json.dumps(value)


def state_of(run: Planned) -> str:
    """What launching the run will do: "done" (nothing), "to continue" or "to do".

    UserError if the folder holds a run with other settings. What only the training reads (data, base) is not looked at: where the
    settings alone do not tell whether a finished run is this one, it is "to continue", and the training decides.
    """
    folder = RunFolder(run.folder, None)
    record = folder.record()
    if record is None:
        return "to do"
    differences = identity.changed_settings(
        record["identity"], config_to_dict(run.config), default_values(type(run.config))
    )
    if differences:
        changes = "; ".join(identity.describe(change) for change in differences)
        raise UserError(
            f"{run.folder} was made with other settings than the experiment has now ({changes}): give the experiment another "
            "folder, or remove that run."
        )
    finished, steps = record["finished_at"], _steps(run, folder)
    is_done = finished is not None and steps is not None and steps <= finished
    return "done" if is_done and folder.adapter.is_file() and _same_facts(run, folder) else "to continue"


def _steps(run: Planned, folder: RunFolder) -> int | None:
    """The length of the run in optimizer steps by its present settings; None if that takes facts that the folder does not have."""
    train = run.config.train
    if train.steps is not None:
        return train.steps
    try:
        plan = records.read_as(folder.plan, records.Plan, "")
        return steps_of(None, train.epochs, plan["items_per_epoch"], plan["global_batch_size"])
    except (ValueError, KeyError, TypeError, ZeroDivisionError):
        return None


def _same_facts(run: Planned, folder: RunFolder) -> bool:
    """Whether the settings that are not part of the identity, because a fact takes their place, leave these facts as they were."""
    if not folder.config.is_file():
        return True
    try:
        was = identity.flatten(read_yaml(str(folder.config)))
    except UserError:
        return False
    now = identity.flatten(config_to_dict(run.config))
    split = ("train.batch_size", "train.accumulation")
    products = {str(math.prod(settings.get(key, 1) for key in split)) for settings in (was, now)}
    return len(products) == 1 and all(was.get(key) == now[key] for key in COVERED)


def note_on_code(run: Planned) -> str:
    """In which files the code of a run that has begun differs from that of the script now; "" if in none."""
    try:
        trained = [
            entry.get("code") or {} for entry in provenance.launches(provenance.entries(run.folder / "provenance.json"))
        ]
    except UserError as error:
        return f"its code is unknown ({error})"
    if not trained or not all(map(code.is_recorded, trained)):
        return "its code was not recorded"
    optimizer = run.config.optimizer.name
    now = code.code_of(run.script, [optimizer] if "." in optimizer else [])
    files = dict.fromkeys(file for was in trained for file in code.changed_files(was, now))
    # A module on a path that only the running script adds is not found from here. If an import was removed, another file tells.
    missing = {file for was in trained for file in was["files"]} - now["files"].keys()
    files = [file for file in files if file not in missing]
    return f"with other code than the script has now: {code.listed(files)}" if files else ""


def scores_state(run: Planned, state: str, command: str | None) -> str | None:
    """ "scored" or "to score" by the experiment's command; None without one. A run that is not done is scored when it is."""
    if command is None:
        return None
    return "scored" if state == "done" and scoring.is_scored(RunFolder(run.folder, None), command) else "to score"


def describe(states: Sequence[tuple[Planned, str]], scores: Mapping[str, str | None] | None = None) -> str:
    """The runs and their states, one per line, with what has changed in the code of those that have begun.

    `scores` has the `scores_state` by the run's name.
    """
    width = max(len(run.name) for run, _ in states)
    lines = []
    for run, state in states:
        parts = (state, (scores or {}).get(run.name), note_on_code(run) if state != "to do" else "")
        lines.append(f"  {run.name:<{width}}  {', '.join(part for part in parts if part)}")
    return "\n".join(lines)
