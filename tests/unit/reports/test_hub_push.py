"""Uploading an adapter with its model card: with the real huggingface_hub, to a hub on this machine."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from fake_hub import fake_hub
from fake_runs import fake_run
from safetensors.torch import save_file

from sushi_research.adapters import bundled
from sushi_research.adapters.snapshots import AVERAGE
from sushi_research.errors import UserError
from sushi_research.reports import hub_push
from sushi_research.reports.model_card import LICENCE, model_card
from sushi_research.runs.run_folder import RunFolder
from sushi_research.training.hub_upload import lines


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with fake_hub(monkeypatch, tmp_path / "hub") as found:
        yield found


def made_run(folder, **lora) -> RunFolder:
    """A finished run whose folder holds all that a card is made from."""
    run = RunFolder(fake_run(folder, steps=(0, 10, 20), pictures=True), None)
    config = {
        "model": {"base": "owner/base-model"},
        "data": {"path": "/home/me/private/photos", "resolution": 512},
        "lora": {"rank": 8, "alpha": 4.0, "targets": "kohya", "metadata": "full", "trigger_words": ["sks|dog"], **lora},
        "train": {"seed": 3},
        "optimizer": {"name": "adamw", "lr": 1e-4},
        "sample": {"steps": 20, "guidance": 2.5},
    }
    run.config.write_text(yaml.safe_dump(config))
    run.plan.write_text(json.dumps({"global_batch_size": 4, "architecture": "sdxl", "images": 16}))
    run.scores.write_text(json.dumps({"concept": {"values": {"a": 1, "b": 0}}}))
    save_file({"x": torch.zeros(2)}, run.adapter, {"ss_sd_model_name": "owner/base-model"})
    return run


def parts(text: bytes) -> tuple[dict, str]:
    _, data, body = text.decode().split("---\n", 2)
    return yaml.safe_load(data), body


def test_a_run_is_uploaded_in_one_commit_with_a_card_of_what_its_folder_says(tmp_path, hub):
    run = made_run(tmp_path / "mycat")
    pushed = hub_push.push(run, run.adapter, "mycat")
    files = hub.files["me/mycat"]
    assert pushed.url.endswith("/me/mycat") and hub.private["me/mycat"] and hub.commits == 1
    assert files["mycat.safetensors"] == run.adapter.read_bytes()
    assert sorted(files) == ["README.md", "images/00-seed0.png", "images/base/00-seed0.png", "mycat.safetensors"]
    last = run.path / "samples/step-00000020/00-seed0.png"
    assert files["images/00-seed0.png"] == last.read_bytes() != files["images/base/00-seed0.png"]
    data, body = parts(files["README.md"])
    assert data["base_model"] == "owner/base-model" and data["instance_prompt"] == "sks|dog" and "license" not in data
    assert data["widget"] == [{"text": "a cat", "output": {"url": "images/00-seed0.png"}}]
    for said in (
        "adapter for SDXL",
        "**sks\\|dog**",
        "| a cat | ![](images/base/00-seed0.png) | ![](images/00-seed0.png) |",
        'load_lora_weights("me/mycat", weight_name="mycat.safetensors")',
        "| rank, alpha | 8, 4.0 |",
        "| steps | 20 |",
        "| concept | 0.5 | 2 |",
        LICENCE,
    ):
        assert said in body, said
    assert "| learned | -" in body and "/home/me" not in body


def test_what_the_author_wrote_stays_at_the_next_upload(tmp_path, hub):
    run = made_run(tmp_path / "mycat")
    hub_push.push(run, run.adapter, "me/mycat")
    files = hub.files["me/mycat"]
    text = (
        files["README.md"]
        .decode()
        .replace("---\n", "---\nlicense: openrail++\n", 1)
        .replace("tags:\n", "tags:\n- cats\n")
    )
    files["README.md"] = text.replace(hub_push.BEGIN, f"By hand.\n\n{hub_push.BEGIN}").encode()
    run.scores.write_text(json.dumps({"concept": {"values": {"a": 1, "b": 1}}}))
    hub_push.push(run, run.adapter, "me/mycat")
    data, body = parts(files["README.md"])
    assert data["license"] == "openrail++" and {"cats", "lora"} <= set(data["tags"]) and len(data["widget"]) == 1
    assert body.count(hub_push.BEGIN) == 1 and body.index("By hand.") < body.index(hub_push.BEGIN)
    assert "| concept | 1 | 2 |" in body and "| concept | 0.5 | 2 |" not in body and "## Licence" not in body
    # An upload of the same again is no commit; a card that is not ours is left alone.
    commits = hub.commits
    assert hub_push.push(run, run.adapter, "me/mycat").note is None and hub.commits == commits
    files["README.md"] = b"# Mine\n"
    assert "left as it is" in hub_push.push(run, run.adapter, "me/mycat").note and files["README.md"] == b"# Mine\n"


@pytest.mark.parametrize("evaluate", [True, False])
def test_results_and_pictures_are_on_the_card_of_the_file_that_they_are_of(tmp_path, evaluate):
    run = made_run(tmp_path / "mycat")
    config = yaml.safe_load(run.config.read_text()) | {"ema": {"decay": 0.99, "evaluate": evaluate}}
    run.config.write_text(yaml.safe_dump(config))
    save_file({"x": torch.zeros(2)}, run.average, {"ss_steps": "20", AVERAGE: "exponential, decay 0.99"})
    cards = {path: model_card(run, path, "me/mycat") for path in (run.average, run.adapter)}
    for path, card in cards.items():
        is_measured = (path == run.average) == evaluate
        said = ("| learned | -", "| concept | 0.5 | 2 |", "Sampled at step 20", "images/00-seed0.png")
        assert all((each in card.text) == is_measured for each in said)
        assert bool(card.pictures) == is_measured and "| steps | 20 |" in card.text
        assert ("Nothing of this file: the run's evaluations are of " in card.text) != is_measured
        assert ("average of the weights over the steps (exponential, decay 0.99)." in card.text) == (
            path == run.average
        )
    # That of an earlier step has other pictures, here none, and no scores, which are of the last.
    save_file({"x": torch.zeros(2)}, run.average, {"ss_steps": "10"})
    card = model_card(run, run.average, "me/mycat")
    assert not card.pictures and "| concept |" not in card.text and ("| learned | -" in card.text) == evaluate


@pytest.mark.parametrize(
    ("step", "widths"),
    [(None, {"text_encoder": 8}), ("@10", {"text_encoder_2": 12, "text_encoder": 8})],
)
def test_the_files_of_new_tokens_are_uploaded_as_the_run_writes_them(tmp_path, hub, step, widths):
    run = made_run(tmp_path / "mycat")
    state = {
        f"{component}.new_tokens.{token}": torch.rand(2, width)
        for token in ("<sks>", "dog")
        for component, width in sorted(widths.items())
    }
    adapter = run.step_adapter(10) if step else run.adapter
    save_file(bundled.bundled_tensors(state, torch.float16), adapter)
    pushed = hub_push.push(run, adapter, "mycat")
    bundled.write_files(tmp_path / adapter.name, state, torch.float16)
    files, stem = hub.files["me/mycat"], adapter.stem
    assert set(pushed.token_files) == {f"{stem}-sks.safetensors", f"{stem}-dog.safetensors"}
    for name in pushed.token_files:
        assert files[name] == (tmp_path / name).read_bytes() and name.encode() in files["README.md"]
    assert (
        f"uploaded the adapter, {pushed.token_files[0]}, {pushed.token_files[1]} and a model card" in lines(pushed)[0]
    )


def test_the_settings_are_those_of_all_parts_of_the_adapter(tmp_path):
    overrides = [{"modules": "mid_block", "rank": 6}, {"modules": "text_encoder.*", "alpha": 9.0, "lr_factor": 0.5}]
    run = made_run(
        tmp_path / "mycat", conv_rank=2, rank_stabilized=True, overrides=overrides, rank_dropout=0.2, trigger_words=[]
    )
    config = yaml.safe_load(run.config.read_text())
    config["text_encoders"] = {"train": True, "rank": 3, "lr": [0.0, 1e-5], "until": 0.5, "alpha": None}
    config["text_encoders"]["new_tokens"] = [{"token": "<sks>", "vectors": 2}]
    config["optimizer"]["lora_plus_ratio"] = 16.0
    run.config.write_text(yaml.safe_dump(config))
    save_file(bundled.bundled_tensors({"text_encoder.new_tokens.<sks>": torch.rand(2, 8)}, torch.float16), run.adapter)
    text = model_card(run, run.adapter, "me/mycat").text
    for row in (
        "| rank, alpha | 8, 4.0 |",
        "| rank, alpha of convolutions | 2, 4.0 |",
        "| scale | alpha / sqrt(rank) |",
        "| rank dropout | 0.2 |",
        "| LoRA+ ratio | 16.0 |",
    ):
        assert row in text, row
    plain = text.replace("\\", "")
    assert "| other modules | mid_block: rank 6; text_encoder.*: alpha 9.0, learning rate times 0.5 |" in plain
    assert "| text encoders | trained, rank 3, learning rate [0.0, 1e-05], until 0.5 |" in plain
    assert "| new tokens (vectors) | <sks> (2) |" in plain.replace("&lt;", "<").replace("&gt;", ">")
    assert "no trigger words" not in text and "It has the new token" in text


@pytest.mark.parametrize("metadata", ["minimal", "none"])
def test_the_card_says_no_more_than_the_file(tmp_path, metadata):
    run = made_run(tmp_path / "mycat", metadata=metadata)
    card = model_card(run, run.adapter, "me/mycat")
    assert not card.pictures and "widget" not in card.data and "sks" in card.text
    for heading in ("Pictures", "Settings", "What was measured"):
        assert f"## {heading}" not in card.text


@pytest.mark.parametrize("published", [True, False])
def test_a_kind_that_diffusers_does_not_load_is_not_called_a_diffusers_adapter(tmp_path, published):
    run = made_run(tmp_path / "mycat", kind="lokr")
    stem = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    size = (640, 2048) if published else (64, 128)
    tensors = {
        "lokr_w1": torch.ones(2, 2),
        "lokr_w2": torch.ones(size[0] // 2, size[1] // 2),
        "alpha": torch.tensor(1.0),
    }
    save_file({f"{stem}.{part}": values for part, values in tensors.items()}, run.adapter)
    card = model_card(run, run.adapter, "me/mycat")
    assert "library_name" not in card.data and "diffusers" not in card.data["tags"]
    assert "diffusers will not load this adapter as it is" in card.text and "load_lora_weights" not in card.text


def test_a_refusal_is_one_sentence(tmp_path, hub):
    run = made_run(tmp_path / "mycat")
    hub.refuses = 403
    with pytest.raises(UserError, match=r"^me/mycat could not be uploaded .*403.*hf auth login") as caught:
        hub_push.push(run, run.adapter, "me/mycat")
    assert "\n" not in str(caught.value)
    run.plan.unlink()
    hub.refuses = 0
    with pytest.raises(UserError, match=r"plan.json is missing: restore it"):
        hub_push.push(run, run.adapter, "me/mycat")
    assert not hub.files
