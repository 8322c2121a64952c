"""Experiment files: variants of a training, each with several seeds; and the state of the experiment's runs."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_validator

from sushi_research.config import TrainingConfig
from sushi_research.config.command_line import config_to_dict, load_config
from sushi_research.config.keys import default_values
from sushi_research.config.section import Bounded, Location, Section, Seed, Text
from sushi_research.config.yaml12 import read_yaml
from sushi_research.errors import UserError
from sushi_research.experiments import scoring
from sushi_research.experiments.script import config_class_of, find_script
from sushi_research.runs import code, identity, provenance, records
from sushi_research.runs.run_folder import RunFolder
from sushi_research.training.length import steps_of

ONE_PROCESS = ["--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
# Settings that the experiment sets itself for each run.
OWN = ("train.seed", "run.name", "run.folder", "dry_run")
# Settings whose resolved value is a fact of the run's identity.
COVERED = ("train.precision", "model.prediction_type", "model.zero_terminal_snr", "model.flow_shift")
# Of one experiment. Every run is trained, and its config is read before the first one starts.
MOST_RUNS = 1000
NESTED = "as in a config file, nested by section"


class Experiment(Section):
    """Variants of a training and the seeds that each variant is trained with."""

    title: Text = Field(description="Title of the comparison page")
    script: Location = Field(
        description="Training script: any that reads its command line with the config class of an architecture, such as a copy of "
        "scripts/train_sdxl_lora.py with another loss"
    )
    configs: Annotated[list[Location], Field(min_length=1), Bounded] = Field(
        description="Config files of all runs; later files override earlier ones"
    )
    settings: dict[str, Any] = Field(
        {},
        description=f"Settings of all runs, which override the config files, {NESTED}",
        json_schema_extra={"allowed": "a section"},
    )
    variants: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$")], Any] = Field(
        {}, description=f"Name of each variant and its settings, {NESTED}", json_schema_extra={"allowed": "settings"}
    )
    grid: dict[str, Any] = Field(
        {},
        description=f"Instead of variants: lists of values, {NESTED}; each combination is a variant",
        json_schema_extra={"allowed": "a section with lists of values"},
    )
    seeds: Annotated[list[Seed], Field(min_length=1), Bounded] = Field(
        [0, 1, 2], description="Training seeds of each variant; a test between variants needs two or more"
    )
    reference: Text | None = Field(
        None, description="Variant that all others are compared with; null = all pairs, which has less power"
    )
    pool_code: bool = Field(
        False, description="Compare runs that were trained with different code as one variant; the page then says so"
    )
    score: Annotated[Text, AfterValidator(scoring.checked)] | None = Field(
        None,
        description=f"Command that writes scores.json into a finished run's folder ({scoring.PLACE}), such as "
        f"{scoring.EXAMPLE}; it is not run by a shell",
    )
    folder: Location = Field(description="Folder of the runs and the page")
    launch: Annotated[list[Text], Bounded] = Field(ONE_PROCESS, description="Arguments of accelerate launch")
    dry_run: bool = Field(False, description="List the runs and their states without training")

    @model_validator(mode="after")
    def _variants_are_given(self) -> Experiment:
        if bool(self.variants) == bool(self.grid):
            raise ValueError("variants and grid are both set or both empty: give one of the two")
        for name, settings in [*self.variants.items(), ("settings", self.settings), ("grid", self.grid)]:
            if not isinstance(settings, dict):
                raise ValueError(
                    f"{name} is not a mapping of settings: nest them by section, as in {{lora: {{rank: 8}}}}"
                )
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds has a duplicate: it would be the same run")
        own = [key for part in (self.settings, self.grid, *self.variants.values()) for key in identity.flatten(part)]
        if taken := [key for key in own if key in OWN]:
            raise ValueError(f"{taken[0]} is set by the experiment itself: remove it")
        return self


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
            f"the variants and seeds make more than {MOST_RUNS} runs: take fewer values in grid, variants or seeds."
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


def variants_of(experiment: Experiment) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, flattened settings) of each variant: as given, or every combination of the grid, named after its values."""
    for name, settings in experiment.variants.items():
        yield name, identity.flatten(settings)
    axes = identity.flatten(experiment.grid)
    for key, values in axes.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"grid: {key} is {values!r}: give a list of the values to try.")
    if axes:
        for values in itertools.product(*axes.values()):
            named = (f"{key.rpartition('.')[2]}-{_in_a_name(value)}" for key, value in zip(axes, values, strict=True))
            yield "_".join(named), dict(zip(axes, values, strict=True))


def _in_a_name(value: Any) -> str:
    """A value as part of a folder name."""
    text = value if isinstance(value, str) else json.dumps(value)
    return "".join(character if character.isalnum() or character in ".-" else "-" for character in text).strip("-")


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
