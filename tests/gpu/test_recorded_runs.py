"""With deterministic kernels a recorded run equals an eager one bit for bit, whatever it trains with."""

from __future__ import annotations

import json
import os
import signal
from typing import Any

import pytest
import torch
from PIL import Image
from script_runs import Trainer, assert_equal

from sushi_research.errors import UserError
from sushi_research.fast.graphs import CudaGraphs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SDXL = pytest.mark.parametrize("architecture", ["sdxl"])
# Several buckets in a step, and the optimizer's step over the flat tensor.
PLAIN = {
    "train.precision": "bf16",
    "train.deterministic": True,
    "train.steps": 3,
    "train.batch_size": 2,
    "train.accumulation": 3,
    "optimizer.name": "adamw8bit",
    "checkpoint.every": None,
}


@pytest.fixture
def captures(monkeypatch):
    """The number of captures so far, as a list of ones."""
    found, capture = [], CudaGraphs.capture

    def counting(self, function):
        replay = capture(self, function)
        found.append(1)
        return replay

    monkeypatch.setattr(CudaGraphs, "capture", counting)
    return found


def paths(trainer: Trainer, name: str) -> list[str]:
    return [each["step_path"] for each in json.loads((trainer.folder(name) / "provenance.json").read_text())]


def require_equal_runs(
    trainer: Trainer, captures: list[int], capfd: Any, changes: dict[str, Any], least: int = 2
) -> None:
    """A recorded run, of at least so many captures, and an eager one with the same settings are equal."""
    assert trainer.train("recorded", PLAIN | changes) == 0
    said = capfd.readouterr().out
    assert "unrecorded" not in said and "is not recorded" not in said
    assert paths(trainer, "recorded") == ["recorded"] and sum(captures) >= least
    captures.clear()
    assert trainer.train("eager", PLAIN | changes | {"train.record_step": False}) == 0
    assert paths(trainer, "eager") == ["eager"] and not captures
    assert_equal(trainer.metrics("recorded"), trainer.metrics("eager"))
    assert_equal(trainer.master_weights("recorded"), trainer.master_weights("eager"))


def test_accumulation_over_several_buckets(gpu_trainer, captures, capfd):
    require_equal_runs(gpu_trainer, captures, capfd, {})


CASES = {
    "fp16": {"train.precision": "fp16", "train.steps": 4},
    "min-SNR and noise offset in fp32": {"train.precision": "fp32", "loss.snr_gamma": 5.0, "loss.noise_offset": 0.1},
    "every choice of noise, loss and timesteps": {
        "loss.type": "pseudo_huber",
        "loss.weighting": "debiased",
        "loss.noise_offset": 0.1,
        "loss.noise_offset_random": True,
        "loss.multires_iterations": 6,
        "loss.input_perturbation": 0.1,
        "timesteps.distribution": "logit_normal",
        "timesteps.max": 900,
    },
    "dropout": {"lora.dropout": 0.3, "lora.targets": "attention"},
    "checkpointing of the feed-forward layers": {
        "train.gradient_checkpointing": "feed_forward",
        "lora.targets": "attention_ff",
    },
    "full checkpointing": {"train.gradient_checkpointing": "all", "lora.targets": "attention_ff"},
    "an order of attention kernels": {"train.attention": ["flash", "efficient", "math"]},
    "resnets": {"lora.targets": "kohya_conv", "optimizer.name": "adamw"},
    "dora": {"lora.kind": "dora", "lora.targets": "kohya_conv", "lora.rank_dropout": 0.2, "lora.module_dropout": 0.2},
    "loha": {"lora.kind": "loha", "lora.targets": "kohya_conv", "lora.rank_dropout": 0.2, "lora.module_dropout": 0.2},
    "lokr on int8": {"lora.kind": "lokr", "lora.targets": "kohya_conv", "model.base_storage": "int8"},
    "int8": {"model.base_storage": "int8"},
    "fp8": {"model.base_storage": "fp8"},
    "nf4": {"model.base_storage": "nf4"},
}


@SDXL
@pytest.mark.parametrize("case", CASES)
def test_the_settings_of_a_step(gpu_trainer, captures, capfd, case):
    require_equal_runs(gpu_trainer, captures, capfd, CASES[case])


@SDXL
def test_masks_prior_preservation_and_texts_of_two_lengths(gpu_trainer, captures, capfd, photos, tmp_path):
    folder = tmp_path / "masked"
    folder.mkdir()
    for path in photos.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
        if path.suffix != ".txt":
            with Image.open(path) as image:
                mask = Image.new("L", image.size)
            mask.paste(255, (0, 0, mask.width // 3, mask.height))
            mask.save(folder / f"{path.stem}-masklabel.png")
    (folder / "1.txt").write_text("a " * 100)
    sets = [
        {"path": str(folder), "masks": {"source": "files", "unmasked": 0.3}},
        {"path": str(photos), "role": "regularisation", "target": "base", "loss_weight": 0.5},
    ]
    changes = {"data.path": None, "data.sets": sets, "captions.chunks": 2, "train.steps": 4}
    require_equal_runs(gpu_trainer, captures, capfd, changes, least=4)


@SDXL
def test_evaluating_and_sampling_in_between_release_and_record_again(gpu_trainer, captures, capfd, monkeypatch):
    """As where memory is tight: the recordings are dropped before each evaluation, and made again after it."""
    changes = {
        "evaluation.held_out": 0.3,
        "evaluation.every": 1,
        "evaluation.noise_samples": 4,
        "sample.enabled": True,
        "sample.every": 2,
        "sample.steps": 2,
        "sample.prompts": ["a picture"],
        "train.batch_size": 1,
        "train.accumulation": 2,
        "train.steps": 2,
    }
    monkeypatch.setattr(CudaGraphs, "is_tight", lambda self: True)
    require_equal_runs(gpu_trainer, captures, capfd, changes, least=3)  # the trial's, and one for each step


@SDXL
def test_a_run_that_was_stopped_continues_exactly(gpu_trainer, captures, monkeypatch):
    assert gpu_trainer.train("whole", PLAIN | {"train.steps": 5}) == 0
    log = gpu_trainer.script.tracking.log

    def stop_at_two(accelerator, metrics, values, step):
        log(accelerator, metrics, values, step)
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(gpu_trainer.script.tracking, "log", stop_at_two)
        assert gpu_trainer.train("parts", PLAIN | {"train.steps": 5}) == 128 + signal.SIGTERM
    assert gpu_trainer.train("parts", PLAIN | {"train.steps": 5}) == 0
    assert paths(gpu_trainer, "parts") == ["recorded", "recorded"]
    assert_equal(gpu_trainer.metrics("parts"), gpu_trainer.metrics("whole"))
    assert_equal(gpu_trainer.master_weights("parts"), gpu_trainer.master_weights("whole"))
    lines = map(json.loads, (gpu_trainer.folder("parts") / "metrics.jsonl").read_text().splitlines())
    assert all(line["gpu_seconds"] > 0 for line in lines)


def change_step(trainer: Trainer, monkeypatch: pytest.MonkeyPatch, action: Any) -> None:
    original = trainer.script.training_step

    def training_step(job, unet, batch, *rest):
        action(batch)
        original(job, unet, batch, *rest)

    monkeypatch.setattr(trainer.script, "training_step", training_step)


@SDXL
def test_a_step_that_waits_for_the_gpu_is_eager_and_the_same(gpu_trainer, monkeypatch, capfd):
    assert gpu_trainer.train("plain", PLAIN | {"train.record_step": False, "lora.dropout": 0.2}) == 0
    with monkeypatch.context() as patch:
        change_step(gpu_trainer, patch, lambda batch: batch.loss_weights.sum().item())
        capfd.readouterr()
        assert gpu_trainer.train("waiting", PLAIN | {"lora.dropout": 0.2}) == 0
    assert "the step is not recorded (" in capfd.readouterr().out
    assert paths(gpu_trainer, "waiting") == ["eager"]
    assert_equal(gpu_trainer.master_weights("waiting"), gpu_trainer.master_weights("plain"))


@SDXL
@pytest.mark.parametrize("recorded", [True, False])
def test_a_micro_batch_that_does_not_fit_ends_the_run_before_its_first_step(gpu_trainer, monkeypatch, recorded):
    change_step(gpu_trainer, monkeypatch, lambda batch: torch.empty(2**50, dtype=torch.uint8, device=batch.device))
    with pytest.raises(UserError, match="out of memory .*--train.gradient_checkpointing all"):
        gpu_trainer.train("run", PLAIN | {"train.record_step": recorded})
    assert not (gpu_trainer.folder("run") / "metrics.jsonl").exists()
