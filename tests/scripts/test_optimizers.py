"""Runs with an optimizer that averages the weights, with Muon, and in fp16 with gradients that overflow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from script_runs import RATE, Trainer
from test_resume import assert_same_result, at_micro_batch, stop

from sushi_research.adapters import lora
from sushi_research.errors import UserError
from sushi_research.stopping import Stopped, stoppable

ONE = pytest.mark.parametrize("architecture", ["sd15"])  # where the scripts share every word
BETA = 0.9  # of AdamWScheduleFree


def in_order(tensors: list[torch.Tensor]) -> torch.Tensor:
    """All numbers of the tensors, sorted: files name them otherwise than the UNet."""
    return torch.cat([tensor.flatten() for tensor in tensors]).sort().values


@ONE
def test_averaged_weights_are_sampled_and_exported_and_change_no_training(
    architecture: str, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`lerp_` back from the averages would round: a run that samples at each step, and resumes, equals one that never does.

    It is stopped in a training step and while sampling, when the weights are the averages.
    """
    settings = {
        "train.steps": 4,
        "optimizer.name": "adamw_schedulefree",
        "optimizer.lr": 0.01,
        "checkpoint.every": None,
        "lora.save_dtype": "float32",
    }
    assert trainer.train("whole", settings) == 0

    sampled = []

    def generate(job: Any, inputs: Any, unet: torch.nn.Module, step: int, *_: Any, **__: Any) -> None:
        sampled.append([parameter.detach().clone() for parameter in lora.adapter_parameters({"unet": unet}).values()])
        if step == 3 and trainer.checkpoint("pieces").step < step:
            stop()

    monkeypatch.setattr(trainer.script.sample_grids, "generate", generate)
    settings |= {"sample.enabled": True, "sample.every": 1}
    with at_micro_batch(trainer, 2, 0, stop):
        trainer.train("pieces", settings)
    with stoppable(), pytest.raises(Stopped):
        trainer.train("pieces", settings)
    assert trainer.checkpoint("pieces").step == 3
    assert trainer.train("pieces", settings) == 0
    assert_same_result(trainer, "pieces", "whole")

    state = trainer.checkpoint("whole").load()
    averages = [
        weights.lerp(state["optimizer"]["tensors"][name]["z"], 1 - 1 / BETA)
        for name, weights in state["adapter"].items()
    ]
    assert not torch.equal(in_order(averages), in_order(list(state["adapter"].values())))
    assert torch.equal(in_order(sampled[-1]), in_order(averages))
    file = [tensor for name, tensor in trainer.adapter("whole").items() if "lora_" in name and "alpha" not in name]
    assert torch.equal(in_order(file), in_order(averages))


@ONE
def test_muon_trains_every_kind_of_tensor_and_resumes(
    architecture: str, trainer: Trainer, capfd: pytest.CaptureFixture[str]
) -> None:
    """Convolutions, which are matrices to it, and the magnitudes of DoRA, which its AdamW trains; two rates, and wsd."""
    settings = {
        "train.steps": 4,
        "optimizer.name": "muon",
        "optimizer.lora_plus_ratio": 2.0,
        "lora.kind": "dora",
        "lora.targets": ["attn2.to_k", "conv1"],
        "schedule.name": "wsd",
        "schedule.decay": 2,
        "checkpoint.every": None,
    }
    assert trainer.train("whole", settings) == 0
    printed = capfd.readouterr().out
    assert "optimizer    muon (pytorch_optimizer.Muon): state " in printed
    assert " tensors that are no matrices are trained by its AdamW" in printed
    assert "; decay in the last 2 steps" in printed
    rates = [(line["lr"], line["lr/unet_up"]) for line in trainer.metrics("whole")]
    assert rates == pytest.approx([(RATE * part, 2 * RATE * part) for part in (1, 1, 1, 1 - 0.5**0.5)])
    with at_micro_batch(trainer, 3, 0, stop):
        trainer.train("pieces", settings)
    assert trainer.train("pieces", settings) == 0
    assert_same_result(trainer, "pieces", "whole")
    state = trainer.checkpoint("whole").load()["optimizer"]["tensors"]
    kept = {frozenset(of_tensor) for name, of_tensor in state.items() if name.endswith("magnitude")}
    assert kept == {frozenset({"exp_avg", "exp_avg_sq"})}
    assert any(of_tensor["momentum_buffer"].ndim == 4 for of_tensor in state.values() if "momentum_buffer" in of_tensor)


@contextmanager
def overflowing(trainer: Trainer, is_bad: Callable[[int], bool]) -> Iterator[None]:
    """The adapter's gradients are NaN in the steps (from 1) for which `is_bad` is true."""
    original = trainer.script.training_step

    def training_step(job: Any, unet: torch.nn.Module, batch: Any, *rest: Any) -> None:
        original(job, unet, batch, *rest)
        if is_bad(int(batch.step) + 1):
            next(iter(lora.adapter_parameters({"unet": unet}).values())).grad.fill_(float("nan"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.script, "training_step", training_step)
        yield


@ONE
def test_skipped_steps_are_counted_over_a_resume(
    architecture: str, trainer: Trainer, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = {"train.steps": 4, "train.precision": "fp16", "checkpoint.every": None}
    with overflowing(trainer, lambda step: step < 3):
        assert trainer.train("whole", settings) == 0
        assert "warning: fp16 skipped 2 of 4 steps, because their gradients overflowed\n" in capfd.readouterr().out
        with at_micro_batch(trainer, 2, 0, stop):
            trainer.train("pieces", settings)
        assert trainer.train("pieces", settings) == 0
    assert [line["skipped_steps"] for line in trainer.metrics("whole")] == [1, 2, 2, 2]
    assert_same_result(trainer, "pieces", "whole")


@ONE
def test_a_run_that_skips_every_step_does_not_finish(architecture: str, trainer: Trainer) -> None:
    settings = {"train.steps": 2, "train.precision": "fp16"}
    for _ in range(2):  # the second time from its checkpoint
        with overflowing(trainer, lambda step: True), pytest.raises(UserError, match="fp16 skipped all 2 steps"):
            trainer.train("run", settings)
        assert trainer.checkpoint("run").step == 1
        assert not (trainer.folder("run") / "run.safetensors").exists()


@ONE
def test_an_adapter_that_does_nothing_is_reported(
    architecture: str, trainer: Trainer, capfd: pytest.CaptureFixture[str]
) -> None:
    """1e-9 is a number in fp32, and zero in the fp16 of the file."""
    assert trainer.train("run", {"train.steps": 1, "optimizer.lr": 1e-9}) == 0
    assert (
        "warning: every second matrix of the adapter is zero in float16, as at the start, so" in capfd.readouterr().out
    )


@ONE
def test_an_optimizer_that_fails_is_refused_before_anything_is_encoded(architecture: str, trainer: Trainer) -> None:
    cache = trainer.runs / "a cache of its own"
    with pytest.raises(UserError, match="SparseAdam does not support dense gradients"):
        trainer.train("run", {"optimizer.name": "torch.optim.SparseAdam", "cache.folder": str(cache)})
    assert not list(cache.rglob("shard-*"))
