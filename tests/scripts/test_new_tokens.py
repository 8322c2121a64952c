"""New tokens trained with the adapter: what they learn, their files, and that other programs and scripts get what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from recorded_runs import Recording
from safetensors.torch import load_file
from script_runs import Trainer, assert_equal
from test_evaluating import evaluate_adapters, tables

from sushi_research.errors import UserError
from sushi_research.training import text_encoders

# "picture" is in the caption of each photo.
TOKEN, VECTORS = "picture", 3
SETTINGS = {
    "text_encoders.new_tokens": [{"token": TOKEN, "vectors": VECTORS, "start_from": "a cat"}],
    "text_encoders.new_tokens_lr": 1e-2,
    "lora.save_dtype": "float32",
}
EVALUATED = {"evaluation.held_out": 0.1, "evaluation.noise_samples": 4, "evaluation.drift_captions": ["a house"]}
PROMPT = "picture 0 of a"


def bare_pipeline(base_folder: Path, encoders: text_encoders.TextEncoders) -> Any:
    """diffusers' pipeline of the base. It pools at the end token, not at the largest id."""
    kind = getattr(diffusers, encoders.model.PIPELINE)
    pipeline = kind.from_pretrained(base_folder, **encoders.model.PIPELINE_WITHOUT)
    if hasattr(pipeline, "text_encoder_2"):
        assert pipeline.text_encoder_2.text_model.eos_token_id == 2
        pipeline.text_encoder_2.text_model.eos_token_id = pipeline.tokenizer_2.eos_token_id
    return pipeline


def test_the_files_give_other_programs_what_was_trained(
    trainer: Trainer, base_folder: Path, architecture: str, kept: list[text_encoders.TextEncoders], tmp_path: Path
) -> None:
    """Of SDXL with adapters on the text encoders; of SD1.5 with an evaluation, whose losses are those of the file."""
    with_adapters = architecture == "sdxl"
    changes = {"text_encoders.train": True, "text_encoders.rank": 2} if with_adapters else EVALUATED
    assert trainer.train("run", SETTINGS | changes) == 0
    names = {"sd15": ["text_encoder"], "sdxl": ["text_encoder", "text_encoder_2"]}[architecture]
    (encoders,) = kept
    weights, file = trainer.master_weights("run"), trainer.adapter("run")
    learned = {name: weights[f"{name}.new_tokens.{TOKEN}"] for name in names}
    keys = ["clip_l", "clip_g"] if with_adapters else ["string_to_param.*"]
    assert {key for key in file if key.startswith("bundle_emb")} == {f"bundle_emb.{TOKEN}.{key}" for key in keys}
    own = load_file(trainer.folder("run") / f"run-{TOKEN}.safetensors")
    assert list(own) == (sorted(keys) if with_adapters else ["emb_params"])
    for name, key, alone in zip(names, keys, keys if with_adapters else ["emb_params"], strict=True):
        assert torch.equal(file[f"bundle_emb.{TOKEN}.{key}"], learned[name])
        assert torch.equal(own[alone], learned[name])

    # Each vector has moved from that of its word: a, cat, a.
    pipeline = bare_pipeline(base_folder, encoders)
    for name in names:
        tokenizer = getattr(pipeline, name.replace("text_encoder", "tokenizer"))
        table = getattr(pipeline, name).get_input_embeddings().weight
        ids = tokenizer("a cat").input_ids[1:-1]
        moved = (learned[name] - table[[ids[number % len(ids)] for number in range(VECTORS)]]).abs()
        assert (moved.amax(1) > 1e-3).all() and (moved < 3.3e-2).all()

    # diffusers, with the file of the token, and the adapter without its key.
    asked = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    plain = pipeline.encode_prompt(PROMPT, **asked)
    for name, key in zip(names, keys if with_adapters else ["emb_params"], strict=True):
        of_name = {
            "text_encoder": getattr(pipeline, name),
            "tokenizer": getattr(pipeline, name.replace("text_encoder", "tokenizer")),
        }
        pipeline.load_textual_inversion(own[key], token=TOKEN, **of_name)
    with pytest.raises(Exception, match="bundle_emb|not been correctly renamed|Invalid"):
        pipeline.load_lora_weights(dict(file))
    pipeline.load_lora_weights({key: tensor for key, tensor in file.items() if not key.startswith("bundle_emb.")})
    found, ours = pipeline.encode_prompt(PROMPT, **asked), encoders.caption(PROMPT)
    for name, number in {"hidden": 0, "pooled": 2}.items():
        if name in ours:
            torch.testing.assert_close(found[number][0].half(), ours[name], rtol=0, atol=2e-3)
            assert (plain[number][0] - found[number][0]).abs().max() > 0.02
    if with_adapters:
        # The trap: where the largest id is taken for the end, the pooled embedding is that of the token.
        pipeline.text_encoder_2.text_model.eos_token_id = 2
        assert (pipeline.encode_prompt(PROMPT, **asked)[2][0].half() - ours["pooled"]).abs().max() > 0.02
        return

    # The losses of the file are those that the run has measured, bit for bit, and the base reads the captions as they stand.
    output = tmp_path / "evaluations"
    evaluate_adapters(trainer, "run", output, [trainer.folder("run") / "run.safetensors"])
    for name, step in (("base", 0), ("run", 3)):
        for rows, every in zip(tables(output / name), tables(trainer.folder("run")), strict=True):
            there = [row for row in every if row["step"] == step]
            columns = ("base_loss",) if step == 0 else ("loss", "base_loss")
            for column in columns:
                assert [row[column] for row in rows] == [row[column] for row in there]


@pytest.mark.parametrize("architecture", ["sd15"])
def test_a_recorded_run_equals_an_eager_one_that_was_resumed(
    trainer: Trainer, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With captions of several chunks that divide the token, noise as a start, and the base's prediction as a target."""
    recording = Recording(monkeypatch)
    sets = [{"path": str(photos)}, {"path": str(photos), "role": "regularisation", "target": "base"}]
    changes = SETTINGS | {"data.path": None, "data.sets": sets, "captions.dropout": 0.3, "lora.max_norm": 1.0}
    changes |= {"text_encoders.new_tokens": [{"token": TOKEN, "vectors": 16}], "text_encoders.until": 0.75}
    assert trainer.train("recorded", changes | {"train.steps": 4}) == 0
    (graphs,) = recording.made
    assert graphs.made < graphs.replayed
    recording.on = False
    for steps in (2, 4):
        assert trainer.train("eager", changes | {"train.steps": steps}) == 0
    assert_equal(trainer.checkpoint("recorded").load(), trainer.checkpoint("eager").load())
    lines = trainer.metrics("eager")
    assert [line["lr/new_tokens"] for line in lines] == [1e-2, 1e-2, 1e-2, 0]
    assert lines[0]["loss"] == trainer.metrics("recorded")[0]["loss"]


@pytest.mark.parametrize("architecture", ["sd15"])
def test_a_run_starts_from_the_tokens_of_a_file(trainer: Trainer, capsys: pytest.CaptureFixture[str]) -> None:
    """Step 0 has the losses of the file, bit for bit. The rate is too low to move far, and the spelling is that of the config."""
    assert trainer.train("first", SETTINGS | EVALUATED) == 0
    named = [{"token": TOKEN.title(), "vectors": VECTORS}]
    changes = SETTINGS | EVALUATED | {"text_encoders.new_tokens": named, "text_encoders.new_tokens_lr": 1e-7}
    changes |= {"train.steps": 1, "lora.start_from": str(trainer.folder("first"))}
    assert trainer.train("second", changes) == 0
    assert "Picture (3 vectors, from lora.start_from)" in capsys.readouterr().out
    learned = trainer.master_weights("first")[f"text_encoder.new_tokens.{TOKEN}"]
    found = trainer.master_weights("second")[f"text_encoder.new_tokens.{TOKEN.title()}"]
    assert 0 < (found - learned).abs().max() < 2e-7
    losses = []
    for name, at in (("first", 3), ("second", 0)):
        rows = [row for every in tables(trainer.folder(name)) for row in every if row["step"] == at]
        losses.append([row[column] for row in rows for column in ("loss", "base_loss") if column in row])
    assert losses[0] == losses[1] and len(set(losses[0])) > 2
    for own, message in (
        (
            [],
            r"the new token picture with 3 vectors, and .*does not name it: .* to \[\{token: picture, vectors: 3\}\], or",
        ),
        ([{"token": TOKEN}], r"text_encoders.new_tokens gives it 1: set"),
        (
            [named[0] | {"start_from": "cat"}],
            "Picture starts from 'cat', and .* has vectors for it: remove its start_from",
        ),
    ):
        rate = {} if own else {"text_encoders.new_tokens_lr": None}
        with pytest.raises(UserError, match=message):
            trainer.train("refused", changes | {"text_encoders.new_tokens": own} | rate)


@pytest.mark.parametrize("architecture", ["sd15"])
def test_mistakes(trainer: Trainer) -> None:
    """A token that no caption has, and one that starts from nothing."""
    with pytest.raises(UserError, match="no caption has the token mycat, so it would learn nothing"):
        trainer.train("one", SETTINGS | {"text_encoders.new_tokens": [{"token": "mycat"}]})
    with pytest.raises(UserError, match="the token picture starts from ' ', which has no tokens: give a word"):
        trainer.train("two", SETTINGS | {"text_encoders.new_tokens": [{"token": TOKEN, "start_from": " "}]})
