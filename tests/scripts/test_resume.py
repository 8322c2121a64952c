"""Stopping and running the same command again: equal, bit for bit, to never having stopped.

The loop is word for word the same in every script (test_alignment.py), so each case runs in one of them.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from script_runs import RATE, TOLERANCE, Trainer, assert_equal, largest_difference, tensors_in

from sushi_research.errors import UserError

# Seven pictures and steps of four: an epoch ends within a step, and no stop below falls on an epoch's end.
STEPS = 6


class Killed(Exception):
    """Stands for whatever ends a process where it stands."""


@contextmanager
def at_micro_batch(trainer: Trainer, step: int, number: int, action: Callable[[], None]) -> Iterator[None]:
    """Does `action` before the micro-batch `number` (from 0) of the step that ends at `step`."""
    original, seen = trainer.script.training_step, []

    def training_step(config: Any, unet: Any, batch: Any, *rest: Any) -> None:
        if int(batch.step) + 1 == step:
            seen.append(batch)
            if len(seen) == number + 1:
                action()
        original(config, unet, batch, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.script, "training_step", training_step)
        yield
    assert len(seen) > number, "the micro-batch was never reached"


def stop() -> None:
    """A second signal, of another kind even, changes nothing."""
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)


def kill() -> None:
    raise Killed


def assert_same_result(trainer: Trainer, found: str, expected: str) -> None:
    """Adapter file, log and last checkpoint of two runs are equal bit for bit."""
    assert_equal(trainer.adapter(found), trainer.adapter(expected))
    assert trainer.metrics(found) == trainer.metrics(expected)
    one, other = trainer.checkpoint(found), trainer.checkpoint(expected)
    assert one.step == other.step
    assert_equal(one.load(), other.load())


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# What a step of each depends on besides the weights: 8-bit states, a loss scaler, draws of every kind, a schedule, two rates.
EVERYTHING = {
    "lora.dropout": 0.3,
    "data.flip": 0.5,
    "loss.noise_offset": 0.1,
    "loss.noise_offset_random": True,
    "loss.multires_iterations": 3,
    "loss.input_perturbation": 0.1,
    "loss.snr_gamma": 5.0,
    "loss.type": "pseudo_huber",
    "timesteps.distribution": "logit_normal",
    "timesteps.min": 100,
    "schedule.name": "cosine",
    "schedule.warmup": 2,
    "train.batch_size": 2,
    "train.accumulation": 2,
    "optimizer.lora_plus_ratio": 4.0,
    "lora.max_norm": 0.003,
}
CASES = {
    "every draw": ("sd15", EVERYTHING),
    # An adapter of 4,096 numbers and more has its states in 8 bits; so wide a rank is needed at these widths.
    "adamw8bit": ("sdxl", {"optimizer.name": "adamw8bit", "lora.rank": 128}),
    "bf16, lion": ("sd15", {"train.precision": "bf16", "optimizer.name": "bitsandbytes.optim.Lion"}),
    "fp16": ("sdxl", {"train.precision": "fp16"}),
    # The adapters on the text encoders end between the two stops.
    "text encoders": (
        "sd15",
        {**EVERYTHING, "text_encoders.train": True, "text_encoders.until": 2, "captions.dropout": 0.3},
    ),
    # It depends on whole tensors, so it gets them one by one.
    "adafactor": ("sdxl", {"optimizer.name": "torch.optim.Adafactor"}),
}


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "settings"), CASES.values(), ids=CASES.keys())
def test_stopping_and_resuming_equals_going_on(
    architecture: str, settings: dict[str, Any], trainer: Trainer, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = {"train.steps": STEPS, "checkpoint.every": None, **settings}
    assert trainer.train("whole", settings) == 0
    state = trainer.checkpoint("whole").load()
    in_8_bits = any(tensor.dtype == torch.uint8 for tensor in tensors_in(state["optimizer"]))
    assert in_8_bits is (settings.get("optimizer.name") == "adamw8bit")
    assert bool(state["scaler"]) is (settings.get("train.precision") == "fp16")
    capfd.readouterr()

    for step in (1, 4):
        with at_micro_batch(trainer, step, 0, stop):
            assert trainer.train("pieces", settings) == 128 + signal.SIGTERM
        assert f"stopped at step {step} of {STEPS};" in capfd.readouterr().out
        assert trainer.checkpoint("pieces").step == step
    assert trainer.train("pieces", settings) == 0
    assert f"continuing the run pieces from step 4 of {STEPS}" in capfd.readouterr().out
    assert_same_result(trainer, "pieces", "whole")


@pytest.mark.parametrize("architecture", ["sdxl"])
def test_killed_within_an_accumulation(architecture: str, trainer: Trainer, capfd: pytest.CaptureFixture[str]) -> None:
    """What was done since the last checkpoint is done again, and is logged once."""
    settings = {**EVERYTHING, "train.steps": STEPS, "checkpoint.every": 2, "checkpoint.keep": 1}
    assert trainer.train("whole", settings) == 0
    with at_micro_batch(trainer, 4, 1, kill), pytest.raises(Killed):
        trainer.train("killed", settings)
    assert trainer.checkpoint("killed").step == 2
    assert [line["step"] for line in trainer.metrics("killed")] == [1, 2, 3]
    assert trainer.train("killed", settings) == 0
    assert f"continuing the run killed from step 2 of {STEPS}" in capfd.readouterr().out
    assert_same_result(trainer, "killed", "whole")
    scaled = [line["max_norm/scaled"] for line in trainer.metrics("whole")]
    assert scaled[0] == 0 < scaled[-1], "some steps begin with weights that were scaled down"


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sdxl"])
def test_killed_before_the_first_checkpoint(architecture: str, trainer: Trainer) -> None:
    settings = {"train.steps": 3, "checkpoint.every": None}
    assert trainer.train("whole", settings) == 0
    with at_micro_batch(trainer, 3, 0, kill), pytest.raises(Killed):
        trainer.train("killed", settings)
    assert len(trainer.metrics("killed")) == 2
    assert trainer.train("killed", settings) == 0
    assert_same_result(trainer, "killed", "whole")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sd15"])
def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(
    architecture: str, trainer: Trainer, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"train.steps": STEPS, "checkpoint.every": 2}
    assert trainer.train("whole", settings) == 0
    with at_micro_batch(trainer, 5, 0, kill), pytest.raises(Killed):
        trainer.train("killed", settings)
    state = trainer.folder("killed") / "checkpoints/step-00000004/state.pt"
    data = bytearray(state.read_bytes())
    data[len(data) // 2] ^= 1
    state.write_bytes(data)
    assert trainer.train("killed", settings) == 0
    assert "step-00000004 is damaged" in caplog.text
    assert_same_result(trainer, "killed", "whole")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sdxl"])
def test_sampling_changes_no_training(architecture: str, trainer: Trainer) -> None:
    """Dropout is the one draw that torch makes itself, from the generator that drawing pictures could disturb."""
    settings = {**EVERYTHING, "train.steps": 3}
    pictures = {"sample.enabled": True, "sample.every": 1, "sample.steps": 2, "sample.prompts": ["a plate"]}
    assert trainer.train("without", settings) == 0
    with at_micro_batch(trainer, 2, 1, stop):
        assert trainer.train("with", {**settings, **pictures}) == 128 + signal.SIGTERM
    assert trainer.train("with", {**settings, **pictures}) == 0
    assert_same_result(trainer, "with", "without")
    generated = {path.name for path in (trainer.folder("with") / "samples").glob("step-*.png")}
    # A run that was asked to stop draws nothing more; the one that continues makes up for the picture of step 2.
    assert generated == {f"step-{step:08d}.png" for step in range(4)}
    assert not (trainer.folder("without") / "samples").exists()


@pytest.mark.parametrize("architecture", ["sd15"])
@pytest.mark.slow
def test_what_a_finished_run_does_when_it_is_run_again(
    architecture: str, trainer: Trainer, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nothing, unless it is to be longer; and it refuses to be another run."""
    settings = {"train.steps": 3, "checkpoint.keep": 2}
    assert trainer.train("run", settings) == 0
    before = files_of(trainer.folder("run"))
    assert {path.name for path in (trainer.folder("run") / "checkpoints").iterdir()} == {
        "step-00000002",
        "step-00000003",
    }
    capfd.readouterr()

    assert trainer.train("run", settings) == 0
    assert "the run run is finished, at step 3: there is nothing to do" in capfd.readouterr().out
    assert files_of(trainer.folder("run")) == before

    for changes, named in [
        ({"lora.rank": 8}, "lora.rank was 4, is now 8"),
        ({"train.batch_size": 3}, "global_batch_size .* was 4, is now 3"),
        ({"train.steps": 5, "train.precision": "bf16"}, 'precision .* was "fp32", is now "bf16"'),
    ]:
        with pytest.raises(UserError, match=f"the run run was started with other settings: {named}; "):
            trainer.train("run", {**settings, **changes})
        assert files_of(trainer.folder("run")) == before

    # Longer, and its steps of four made of other micro-batches. The first three steps stay as they are.
    longer = {"train.steps": 5, "train.batch_size": 2, "train.accumulation": 2}
    assert trainer.train("run", {**settings, **longer}) == 0
    assert trainer.plan("run")["split"] == {"batch_size": 2, "accumulation": 2, "processes": 1}
    assert trainer.train("scratch", {**settings, "train.steps": 5}) == 0
    assert [line["step"] for line in trainer.metrics("run")] == [1, 2, 3, 4, 5]
    assert trainer.metrics("run")[:3] == trainer.metrics("scratch")[:3]
    assert largest_difference(trainer.master_weights("run"), trainer.master_weights("scratch")) < TOLERANCE * RATE


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sdxl"])
def test_a_longer_run_equals_one_from_scratch(
    architecture: str, trainer: Trainer, capfd: pytest.CaptureFixture[str]
) -> None:
    """With a constant rate, bit for bit; where the rate depends on the length, a warning says what differs."""
    assert trainer.train("run", {"train.steps": 2}) == 0
    assert trainer.train("run", {"train.steps": 4}) == 0
    assert trainer.train("scratch", {"train.steps": 4}) == 0
    assert_same_result(trainer, "run", "scratch")
    assert "warning" not in capfd.readouterr().out

    assert trainer.train("cosine", {"train.steps": 2, "schedule.name": "cosine"}) == 0
    assert trainer.train("cosine", {"train.steps": 4, "schedule.name": "cosine"}) == 0
    assert "warning: the length changes from 2 to 4 steps" in capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sd15"])
def test_with_dropout_a_run_keeps_its_micro_batches(architecture: str, trainer: Trainer) -> None:
    """torch draws the dropout of a micro-batch at once, so another split is another draw, and refused."""
    settings = {"train.steps": 1, "lora.dropout": 0.1, "train.batch_size": 2, "train.accumulation": 2}
    assert trainer.train("run", settings) == 0
    with pytest.raises(UserError, match="dropout_split"):
        trainer.train("run", {**settings, "train.steps": 2, "train.batch_size": 4, "train.accumulation": 1})
    assert trainer.train("run", {**settings, "train.steps": 2}) == 0


@pytest.mark.parametrize("architecture", ["sd15"])
def test_a_signal_before_the_first_step_ends_the_command_at_once(
    architecture: str, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first evaluation and samples may take long, and nothing has been learned that a checkpoint could keep."""
    monkeypatch.setattr(trainer.script.sample_grids, "generate", lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))
    # Where the tests run in the background, SIGINT is ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            trainer.train("run", {"train.steps": 2})
    finally:
        signal.signal(signal.SIGINT, before)
    assert not any((trainer.runs / "run" / "checkpoints").glob("*")), "no step was taken"
