"""Training from recordings, with the stand-in for CUDA graphs, is training: the same losses and weights, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from recorded_runs import Recording
from script_runs import Trainer, assert_equal
from test_masks import add_masks

from sushi_research.errors import UserError
from sushi_research.runs import provenance

ONE = pytest.mark.parametrize("architecture", ["sd15"])


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> Recording:
    return Recording(monkeypatch)


def entries(trainer: Trainer, name: str) -> list[dict[str, Any]]:
    return json.loads((trainer.folder(name) / "provenance.json").read_text())


def copies(photos: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "masked"
    folder.mkdir()
    for path in photos.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    add_masks(folder)
    return folder


def everything(photos: Path, tmp_path: Path) -> dict[str, Any]:
    """Masks, the base's prediction as target, magnitudes, every dropout, min-SNR, several buckets in a step, and
    every change of noise, loss and timesteps."""
    sets = [
        {"path": str(copies(photos, tmp_path)), "masks": {"source": "files", "unmasked": 0.3}, "flip": 0.5},
        {"path": str(photos), "role": "regularisation", "target": "base", "loss_weight": 0.5},
    ]
    return {
        "data.path": None,
        "data.sets": sets,
        "train.batch_size": 3,
        "train.accumulation": 3,
        "train.steps": 2,
        "loss.snr_gamma": 5.0,
        "loss.noise_offset": 0.1,
        "loss.noise_offset_random": True,
        "loss.multires_iterations": 3,
        "loss.input_perturbation": 0.1,
        "loss.type": "huber",
        "timesteps.distribution": "sigmoid",
        "timesteps.max": 900,
        "lora.kind": "dora",
        "lora.dropout": 0.2,
        "lora.rank_dropout": 0.2,
        "lora.module_dropout": 0.2,
        "captions.chunks": 2,
        "optimizer.name": "adamw8bit",
    }


@pytest.mark.parametrize("architecture", ["sdxl"])
def test_a_recorded_run_equals_an_eager_one(
    trainer: Trainer, photos: Path, tmp_path: Path, recording: Recording
) -> None:
    settings = everything(photos, tmp_path)
    # One caption is longer than a chunk, so that some batches have a mask of the text, and texts of two lengths.
    (tmp_path / "masked/1.txt").write_text("a " * 100)
    assert trainer.train("recorded", settings) == 0
    recording.on = False
    assert trainer.train("eager", settings) == 0
    assert_equal(trainer.metrics("recorded"), trainer.metrics("eager"))
    assert_equal(trainer.master_weights("recorded"), trainer.master_weights("eager"))
    (graphs,) = recording.made
    assert 4 <= graphs.made < graphs.replayed
    assert [each["step_path"] for name in ("recorded", "eager") for each in entries(trainer, name)] == [
        "recorded",
        "eager",
    ]


@ONE
def test_fp16_is_scaled_within_the_recording(trainer: Trainer, recording: Recording) -> None:
    settings = {"train.precision": "fp16", "train.steps": 2, "train.batch_size": 3}
    assert trainer.train("recorded", settings) == 0
    recording.on = False
    assert trainer.train("eager", settings) == 0
    assert_equal(trainer.metrics("recorded"), trainer.metrics("eager"))
    assert_equal(trainer.checkpoint("recorded").load(), trainer.checkpoint("eager").load())
    assert recording.made[0].replayed > recording.made[0].made > 0


@ONE
def test_the_path_may_change_on_the_way_and_a_warning_says_so(
    trainer: Trainer, recording: Recording, capfd: pytest.CaptureFixture[str]
) -> None:
    assert trainer.train("run", {"train.steps": 2}) == 0
    assert trainer.train("run", {"train.steps": 3}) == 0
    assert "the step was" not in capfd.readouterr().out
    recording.on = False
    assert trainer.train("run", {"train.steps": 4, "train.attention": ["flash", "math"]}) == 0
    said = capfd.readouterr().out
    assert "warning: the step was recorded and is eager; the result may differ from an uninterrupted run's\n" in said
    assert 'warning: train.attention was "sdpa" and is ["flash", "math"]; the result may differ' in said
    assert [each["step_path"] for each in entries(trainer, "run")] == ["recorded", "recorded", "eager"]
    # As an older version wrote it, without the key.
    assert provenance.path_changes({"step": 0}, "eager") == []
    assert len(provenance.path_changes({"step": 0}, "recorded")) == 1


def in_step(trainer: Trainer, monkeypatch: pytest.MonkeyPatch, action: Callable[[Any], None]) -> None:
    original = trainer.script.training_step

    def training_step(job: Any, unet: Any, batch: Any, *rest: Any) -> None:
        action(batch)
        original(job, unet, batch, *rest)

    monkeypatch.setattr(trainer.script, "training_step", training_step)


@ONE
def test_a_step_that_cannot_be_recorded_makes_the_run_eager(
    trainer: Trainer, recording: Recording, monkeypatch: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    in_step(trainer, monkeypatch, lambda batch: batch.names)
    assert trainer.train("run", {"train.steps": 2}) == 0
    said = capfd.readouterr().out
    assert (
        "the step is not recorded (AttributeError: a recorded step cannot read batch.names, which is not a tensor)"
        in said
    )
    assert said.count("is not recorded") == 1 and "unrecorded" not in said
    assert entries(trainer, "run")[-1]["step_path"] == "eager" and recording.made[0].made == 0
    assert [line["step"] for line in trainer.metrics("run")] == [1, 2]


@ONE
def test_a_largest_micro_batch_that_does_not_fit_ends_the_run_before_its_first_step(
    trainer: Trainer, recording: Recording, monkeypatch: Any
) -> None:
    sizes = []

    def refuse(batch: Any) -> None:
        sizes.append((len(batch), tuple(batch.mean.shape[-2:])))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    in_step(trainer, monkeypatch, refuse)
    with pytest.raises(UserError, match="out of memory .CUDA out of memory.*--train.gradient_checkpointing all"):
        trainer.train("run", {"train.steps": 2, "train.batch_size": 2})
    assert len(sizes) == 1 and not (trainer.folder("run") / "metrics.jsonl").exists()
