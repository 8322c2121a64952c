"""Sweeps: what W&B's agent makes of each file is a command line of ours, and its run is the agent's."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import yaml
from script_runs import CONFIGS, ROOT

from sushi_research.config.command_line import load_config
from sushi_research.runs.run_folder import open_run_folder, sweep_run_id
from sushi_research.training.run import tracking

SWEEPS = sorted((ROOT / "configs/sweeps").glob("*.yaml"))


def commands(sweep: dict) -> list[list[str]]:
    """The command of each combination (the ends of a distribution), as wandb_agent.Agent._command_run puts it together."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    axes = {
        name: parameter.get("values")
        or [parameter["min"], (parameter["min"] * parameter["max"]) ** 0.5, parameter["max"]]
        for name, parameter in sweep["parameters"].items()
    }
    found = []
    for values in itertools.product(*axes.values()):
        args = {name: {"value": value} for name, value in zip(axes, values, strict=True)}
        known = {"program": [sweep["program"]], **create_sweep_command_args({"args": args})}
        words = []
        for word in sweep["command"]:
            words += known[word[2:-1]] if word.startswith("${") else [word]
        found.append(words)
    return found


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_combination_is_a_config(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    sweep = yaml.safe_load(path.read_text())
    script = sweep["program"]
    architecture = script.removeprefix("scripts/train_").removesuffix("_lora.py")
    assert (ROOT / script).is_file() and sweep["metric"] == {"name": "evaluation/loss_over_base", "goal": "minimize"}
    configs = []
    for words in commands(sweep):
        assert words[:3] == ["accelerate", "launch", script]
        configs.append(load_config(CONFIGS[architecture], words[3:], script=script, intro="1\n2\n3\n4\n5"))
    for name, parameter in sweep["parameters"].items():
        section, _, key = name.partition(".")
        seen = {getattr(getattr(config, section), key) for config in configs}
        assert len(seen) == len(parameter.get("values", [1, 2, 3])), f"{name} does not reach the config: {seen}"
    assert all(config.evaluation.held_out == 0.2 for config in configs)


def test_there_are_sweeps_for_both_architectures():
    programs = {yaml.safe_load(path.read_text())["program"] for path in SWEEPS}
    assert programs == {"scripts/train_sd15_lora.py", "scripts/train_sdxl_lora.py"}


def test_under_an_agent_the_run_has_the_agents_id(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("WANDB_RUN_ID", "from-a-shell")
    monkeypatch.delenv("WANDB_SWEEP_ID", raising=False)
    assert sweep_run_id() is None
    with open_run_folder(tmp_path, "plain") as run:
        assert run.mark_started({}, 1)["wandb_id"] != "from-a-shell"
    monkeypatch.setenv("WANDB_SWEEP_ID", "s1")
    with open_run_folder(tmp_path, "swept") as run:
        assert run.mark_started({}, 1)["wandb_id"] == "from-a-shell"


@pytest.mark.parametrize("architecture", ["sd15"])
@pytest.mark.slow
def test_a_training_under_an_agent_tells_wandb_the_agents_id(trainer, monkeypatch):
    """A run that another agent's run continues goes on under that one's id: W&B takes no other under a sweep."""
    given = []
    monkeypatch.setattr(tracking, "start_trackers", lambda *_, **options: given.append(options["run_id"]))
    monkeypatch.setenv("WANDB_SWEEP_ID", "s1")
    for agent, steps in (("first", 1), ("second", 2)):
        monkeypatch.setenv("WANDB_RUN_ID", agent)
        assert trainer.train("run", {"train.steps": steps, "tracking.wandb": "offline"}) == 0
    assert given == ["first", "second"]
