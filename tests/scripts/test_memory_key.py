"""A run with train.memory: what it chooses is recorded and kept, and its rate serves later plans."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from script_runs import Trainer

from sushi_research.config.yaml12 import read_yaml
from sushi_research.training import memory_choice

pytestmark = pytest.mark.parametrize("architecture", ["sd15"])


def test_a_choice_is_in_the_config_kept_on_resume_and_measured(trainer: Trainer, monkeypatch, capsys):
    settings = {"train.memory": "8GB", "train.batch_size": 2, "train.accumulation": 2}
    assert trainer.train("run", settings) == 0
    train = read_yaml(str(trainer.folder("run") / "config.yaml"))["train"]
    assert [train[key] for key in ("memory", "batch_size", "accumulation", "gradient_checkpointing")] == [
        *("8GB", 4, 1, "none"),
    ]
    plan = json.loads((trainer.folder("run") / "plan.json").read_text())
    assert plan["split"]["batch_size"] == 4
    [bucket, *_] = plan["cost"]["buckets"].values()
    assert bucket["samples"] == 4 and 0 < bucket["allocated"] < bucket["with_context"]
    capsys.readouterr()

    # A version that would choose otherwise goes on with the choice of the run.
    monkeypatch.setattr(memory_choice, "_choose", None)
    assert trainer.train("run", settings | {"train.steps": 5}) == 0
    assert (
        "batch 4 x accumulation 1, gradient_checkpointing none, as the run has begun with it" in capsys.readouterr().out
    )

    # Another run of this machine knows its speed at another size, as an estimate.
    dry = trainer.config("other", {"train.batch_size": 2}).model_copy(update={"dry_run": True})
    assert trainer.script.main(dry) == 0
    printed = capsys.readouterr().out
    [line] = [line for line in printed.splitlines() if line.startswith("speed ")]
    assert line.endswith("an estimate, from the rate that other runs reached on this device")

    # A base of another size has rates of its own.
    cache = Path(read_yaml(str(trainer.folder("run") / "config.yaml"))["cache"]["folder"])
    [*_, conditions] = json.loads(next(cache.glob("rates/*.json")).read_text())["rates"]
    assert json.loads(conditions)["base_bytes"] == plan["base"]["weights"]["compute_bytes"]
