"""Runs on a base that is held in 8 or 4 bits (model.base_storage)."""

import pytest
import torch
from script_runs import assert_equal

from sushi_research.errors import UserError
from sushi_research.models import storage
from sushi_research.training import run


@pytest.mark.parametrize(("architecture", "held"), [("sd15", "int8"), ("sdxl", "fp8"), ("sdxl", "nf4")])
def test_a_run_trains_and_resumes_exactly(trainer, held, capsys):
    changes = {"model.base_storage": held, "lora.targets": ["attn2.to_k", "conv1"], "train.steps": 3}
    changes |= {"train.gradient_checkpointing": True} if held == "fp8" else {}
    if held == "nf4":  # the stored UNet is also evaluated, and samples the images of the drift
        changes |= {"evaluation.held_out": 0.3, "evaluation.drift_captions": ["a plate"]}
    assert trainer.train("whole", changes) == 0
    assert trainer.train("parts", changes | {"train.steps": 1}) == 0
    assert trainer.train("parts", changes) == 0
    assert_equal(trainer.adapter("parts"), trainer.adapter("whole"))
    losses = [[line["loss"] for line in trainer.metrics(name) if "loss" in line] for name in ("parts", "whole")]
    assert losses[0] == losses[1] and len(losses[0]) == 3

    plan = trainer.plan("whole")
    weights = plan["base"]["weights"]
    assert weights["storage"] == held and weights["bytes"] < 0.8 * weights["compute_bytes"]
    assert plan["dtypes"]["frozen UNet weights"] == f"{held}, restored in float32 for each use"
    assert "this changes what is learned" in capsys.readouterr().out
    with pytest.raises(UserError, match=f'model.base_storage was "{held}", is now "compute"'):
        trainer.train("whole", changes | {"model.base_storage": "compute", "train.steps": 4})


@pytest.mark.parametrize("architecture", ["sd15"])
def test_what_does_not_run_here_ends_before_anything_is_encoded(trainer, monkeypatch):
    def missing(*_):
        raise ImportError("No module named 'bitsandbytes'")

    monkeypatch.setitem(storage._FORMS, "nf4", (missing, missing))
    with pytest.raises(UserError, match="model.base_storage is nf4, which does not run here .* take int8 or compute"):
        trainer.train("run", {"model.base_storage": "nf4"})
    assert not trainer.folder("run").exists()


@pytest.mark.parametrize("architecture", ["sd15"])
def test_out_of_memory_proposes_it_once(trainer):
    error = torch.OutOfMemoryError("CUDA out of memory.")
    full, small = (trainer.config("run", {"model.base_storage": held}) for held in ("compute", "int8"))
    assert "--model.base_storage int8 (half of the base's memory, in a new run" in str(run.out_of_memory(full, error))
    assert "base_storage" not in str(run.out_of_memory(small, error))
