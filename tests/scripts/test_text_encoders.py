"""Adapters on the text encoders: what they learn, when they end, and that every use of a run has the encoders as they are."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from accelerate import Accelerator
from recorded_runs import Recording
from script_runs import RATE, Trainer, assert_equal
from test_evaluating import evaluate_adapters, tables
from transformers import CLIPTextConfig, CLIPTextModel

from sushi_research import conditioning, models
from sushi_research.adapters import lora
from sushi_research.errors import UserError
from sushi_research.models.loading import find_base
from sushi_research.planning.op_counts import Counter
from sushi_research.planning.step_trace import STRIDE, Shape
from sushi_research.runs.checkpoint import read_checkpoint
from sushi_research.runs.job import Job
from sushi_research.training import text_encoder_plan, text_encoders

SETTINGS = {
    "text_encoders.train": True,
    "text_encoders.rank": 2,
    "text_encoders.lr": 1e-2,
    "lora.save_dtype": "float32",
}
EVALUATED = {"evaluation.held_out": 0.1, "evaluation.noise_samples": 4, "evaluation.drift_captions": ["a house"]}
OF_TEXT = ("text_encoder.", "text_encoder_2.")


def largest_ups(weights: dict[str, torch.Tensor]) -> dict[str, float]:
    """The largest number of each second matrix, which starts at zero."""
    return {name: float(tensor.abs().max()) for name, tensor in weights.items() if ".lora_B." in name}


def test_the_file_gives_other_programs_what_was_trained(
    trainer: Trainer,
    base_folder: Path,
    architecture: str,
    kept: list[text_encoders.TextEncoders],
    tmp_path: Path,
) -> None:
    """diffusers gets the same embeddings from the file; idle layers stay as they are; the losses are those of the file."""
    # The last layer of each first encoder here does not reach the UNet.
    settings = SETTINGS | (EVALUATED if architecture == "sdxl" else {"model.clip_skip": 2})
    assert trainer.train("run", settings) == 0
    ups = largest_ups(trainer.master_weights("run"))
    idle = {name for name in ups if name.startswith("text_encoder.") and ".layers.2." in name}
    assert len(idle) == 6 == trainer.plan("run")["text_encoders"]["idle"]
    assert {name for name, largest in ups.items() if not largest} == idle
    assert sum(name.startswith(OF_TEXT) for name in ups) == (18 if architecture == "sd15" else 36)

    (encoders,) = kept
    pipeline = getattr(diffusers, encoders.model.PIPELINE).from_pretrained(
        base_folder, **encoders.model.PIPELINE_WITHOUT
    )
    asked = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}

    def encode() -> Any:
        if architecture == "sdxl":
            return pipeline.encode_prompt("picture 0 of a", **asked)
        # diffusers' own clip_skip looks for a module that transformers 5 does not have.
        ids = encoders.ids("picture 0 of a")["ids"]
        return [conditioning.encode_one(pipeline.text_encoder, ids, 2).detach()]

    base = encode()
    pipeline.load_lora_weights(trainer.folder("run") / "run.safetensors")
    found = encode()
    ours = encoders.caption("picture 0 of a")
    for name, number in {"hidden": 0, "pooled": 2}.items():
        if name in ours:
            torch.testing.assert_close(found[number][0].detach().half(), ours[name], rtol=0, atol=2e-3)
            assert (base[number][0] - found[number][0]).abs().max() > 0.02

    if architecture == "sd15":
        return
    # Another run goes on from the file: it begins at these numbers, and its next step is that of the run, had it gone on.
    again = SETTINGS | {"text_encoders.rank": None, "lora.rank": None, "lora.alpha": None, "lora.targets": None}
    again |= {"lora.start_from": str(trainer.folder("run")), "train.steps": 1, "evaluation.held_out": 0.0}
    assert trainer.train("again", again) == 0
    start, now = trainer.master_weights("run"), trainer.master_weights("again")
    assert now.keys() == start.keys()
    for name, tensor in now.items():
        rate = 1e-2 if name.startswith(OF_TEXT) else RATE
        assert 0 < (tensor - start[name]).abs().max() < 1.1 * rate or name.replace("lora_A", "lora_B") in idle, name
    with pytest.raises(
        UserError, match=r"adapts the text encoders too .* set text_encoders.train true, or start from a file"
    ):
        trainer.train(
            "other", again | dict.fromkeys(["text_encoders.lr", "text_encoders.rank"]) | {"text_encoders.train": False}
        )

    # The losses of the file are those that the run has measured with the encoders in training, bit for bit.
    output = tmp_path / "evaluations"
    evaluate_adapters(trainer, "run", output, [trainer.folder("run") / "run.safetensors"])
    for name, step in (("base", 0), ("run", 3)):
        for rows, every in zip(tables(output / name), tables(trainer.folder("run")), strict=True):
            there = [row for row in every if row["step"] == step]
            for column in ("loss", "base_loss"):
                assert [row[column] for row in rows] == [row[column] for row in there]


@pytest.mark.parametrize("architecture", ["sdxl"])
def test_a_recorded_run_equals_an_eager_one_across_the_end_of_the_encoders(
    trainer: Trainer, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With captions of two lengths, captions that become zeros, and the base's prediction as a target."""
    recording = Recording(monkeypatch)
    learned = shutil.copytree(photos, tmp_path / "learned")
    (learned / "1.txt").write_text("a " * 100)
    sets = [{"path": str(learned)}, {"path": str(photos), "role": "regularisation", "target": "base"}]
    changes = {"data.path": None, "data.sets": sets, "captions.chunks": 2, "captions.dropout": 0.4}
    changes |= {"captions.dropout_to": "zeros", "text_encoders.until": 2, "checkpoint.every": 1, "train.steps": 4}
    assert trainer.train("recorded", SETTINGS | changes) == 0
    (graphs,) = recording.made
    assert graphs.made < graphs.replayed
    recording.on = False
    assert trainer.train("eager", SETTINGS | changes) == 0
    assert_equal(trainer.metrics("recorded"), trainer.metrics("eager"))
    assert_equal(trainer.checkpoint("recorded").load(), trainer.checkpoint("eager").load())
    assert [line["lr/text_encoder"] for line in trainer.metrics("eager")] == [1e-2, 1e-2, 0, 0]
    before, last = (
        read_checkpoint(path).load()["adapter"] for path in sorted((trainer.folder("eager") / "checkpoints").iterdir())
    )
    for name, tensor in last.items():
        assert torch.equal(tensor, before[name]) is (name.startswith(OF_TEXT)), name


@pytest.mark.parametrize("architecture", ["sdxl"])
def test_after_their_end_the_encoders_drop_nothing(trainer: Trainer, architecture: str) -> None:
    """What is not trained any more gives the UNet the same embeddings each time, as those of evaluating and sampling."""
    config = trainer.config("run", SETTINGS | {"lora.dropout": 0.5, "lora.module_dropout": 0.5})
    job = Job(config, models.load(architecture), Accelerator(cpu=True), "fp32")
    caches = SimpleNamespace(chunks=conditioning.ONE_CHUNK)
    base = find_base(config, job.model)
    encoders = text_encoders.prepare(job, SimpleNamespace(base=base, caches=caches, own_prompts={}))
    for parameter in lora.adapter_parameters(encoders.components).values():
        parameter.data.normal_(std=0.1)
    ids = conditioning.batch_ids([encoders.ids("a")], "separate")
    assert not torch.equal(encoders(ids)["hidden"], encoders(ids)["hidden"])
    encoders.freeze()
    drawn = torch.random.get_rng_state()
    hidden = encoders(ids)["hidden"]
    assert torch.equal(torch.random.get_rng_state(), drawn) and not hidden.requires_grad
    assert torch.equal(hidden[0].half(), encoders.caption("a")["hidden"])
    assert torch.equal(hidden, encoders(ids)["hidden"])


def test_dropout_of_the_encoders_own_stays_off() -> None:
    """A base's config may have one, which the cache does not use, and whose masks checkpointing would not draw again."""
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = CLIPTextModel(CLIPTextConfig(vocab_size=9, attention_dropout=0.5, **sizes)).eval()
    ids = torch.arange(9)[None]
    expected = encoder(ids).last_hidden_state
    encoder.train()
    assert not torch.equal(encoder(ids).last_hidden_state, expected)
    text_encoders.to_training(encoder)
    assert encoder.training and torch.equal(encoder(ids).last_hidden_state, expected)


@pytest.mark.parametrize("architecture", ["sdxl"])
def test_the_plan_counts_what_encoding_costs(trainer: Trainer, architecture: str) -> None:
    """The FLOPs of a trace without weights are those of encoding forward and backward, and what that saves is in its peak."""
    config = trainer.config("run", SETTINGS)
    job = Job(config, models.load(architecture), Accelerator(cpu=True), "fp32")
    base = find_base(config, job.model)
    cost = text_encoder_plan.cost_of(job, base, "none")
    caches = SimpleNamespace(chunks=conditioning.ONE_CHUNK)
    encoders = text_encoders.prepare(job, SimpleNamespace(base=base, caches=caches, own_prompts={}))
    ids = conditioning.batch_ids([encoders.ids("a"), encoders.ids("b"), encoders.ids("")], "separate")
    parameters = [parameter for each in encoders.components.values() for parameter in each.parameters()]
    with Counter(parameters) as counter:
        sum(tensor.sum() for tensor in encoders(ids).values()).backward()
    found, shape = counter.counts(), Shape(3, STRIDE, STRIDE, 1)
    assert found.flops == cost.flops_of(shape) > 0
    assert 0.5 * cost.peak_bytes(shape) < found.saved_bytes < cost.peak_bytes(shape)
