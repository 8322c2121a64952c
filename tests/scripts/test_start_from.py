"""`lora.start_from`: a run that starts from an adapter file, of this or of another trainer."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from script_runs import Trainer, assert_equal
from test_resume import Killed, at_micro_batch, kill

from sushi_research.adapters import lora
from sushi_research.adapters.description import describe
from sushi_research.adapters.kinds.initial import initial_down
from sushi_research.adapters.reading import read_adapter
from sushi_research.errors import UserError
from sushi_research.evaluation.results import Results

# SDXL has names of its own in the file.
ARCHITECTURE = "sdxl"
EVALUATED = {"evaluation.held_out": 0.3, "evaluation.noise_samples": 4, "evaluation.drift_captions": []}
# What is given here in other tests comes from the file.
NULL = {"lora.rank": None, "lora.alpha": None, "lora.targets": None}
SHORT = {"train.steps": 1, "lora.save_dtype": "float32"}


@pytest.fixture(scope="module")
def first(bases, photos, caches, tmp_path_factory) -> Trainer:
    """A trainer with a finished run, "first", of two steps, which was evaluated."""
    trainer = Trainer(ARCHITECTURE, bases[ARCHITECTURE], photos, tmp_path_factory.mktemp("runs"), caches)
    assert trainer.train("first", SHORT | EVALUATED | {"train.steps": 2}) == 0
    return trainer


def starting(where: object, **changes: object) -> dict:
    return SHORT | NULL | {"lora.start_from": str(where)} | changes


def weights_at_start(trainer: Trainer, name: str, changes: dict) -> dict[str, torch.Tensor]:
    """The UNet's adapter as it is at the first training step."""
    found, real = {}, trainer.script.training_step

    def watch(job, unet, *rest):
        found.update({key: value.detach().clone() for key, value in lora.adapter_parameters({"unet": unet}).items()})
        return real(job, unet, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.script, "training_step", watch)
        assert trainer.train(name, changes) == 0
    return found


def test_it_starts_at_the_values_of_the_file_and_says_where_it_came_from(first):
    folder = first.folder("first")
    weights = weights_at_start(first, "second", starting(folder, **{"optimizer.lr": 1e-4}))
    assert_equal(list(weights), list(first.master_weights("first")))
    for key, tensor in first.master_weights("first").items():
        assert torch.equal(weights[key], tensor), key
    config = (first.folder("second") / "config.yaml").read_text()
    assert "rank: 4" in config and "alpha: 2.0" in config and "attn2.to_k" in config
    assert first.train("third", starting(first.folder("second"))) == 0
    with safe_open(first.folder("third") / "third.safetensors", "pt") as file:
        chain = json.loads(file.metadata()["sushi_research.started_from"])
    assert [(each["name"], each["steps"]) for each in chain] == [("first", 2), ("second", 1)]
    with safe_open(folder / "first.safetensors", "pt") as file:
        assert chain[0]["hash"] == file.metadata()["sshs_model_hash"]

    described = dict(describe(first.folder("third") / "third.safetensors"))
    assert described["started from"] == "first (2 steps), then second (1 steps)"

    # The run goes on from a file of the same content elsewhere, and from no other.
    shutil.copy(folder / "first.safetensors", folder.parent / "moved.safetensors")
    moved = starting(folder.parent / "moved.safetensors", **{"optimizer.lr": 1e-4, "train.steps": 2})
    assert first.train("second", moved) == 0
    for other in (starting(first.folder("third")), SHORT):
        with pytest.raises(
            UserError, match=r"the run second was started with other settings: .*start_from \(hash of .* was"
        ):
            first.train("second", other | {"optimizer.lr": 1e-4, "train.steps": 3})


def test_a_file_of_the_initial_adapter_gives_the_run_without_a_file(first, tmp_path):
    """Bit for bit, with dropout: a file changes nothing but the values at the start. It is in peft's naming here."""
    settings = {"train.steps": 2, "train.seed": 5, "lora.dropout": 0.2, "lora.save_dtype": "float32"}
    assert first.train("without", settings) == 0
    tensors = {}
    for name, tensor in first.master_weights("without").items():
        path, _, matrix = name.partition(".lora_")
        initial = (
            initial_down(5, path, tuple(tensor.shape), "default") if matrix[0] == "A" else torch.zeros(tensor.shape)
        )
        tensors |= {f"unet.{name}": initial, f"unet.{path}.alpha": torch.tensor(2.0)}
    save_file(tensors, tmp_path / "initial.safetensors")
    assert first.train("with", settings | NULL | {"lora.start_from": str(tmp_path / "initial.safetensors")}) == 0
    assert_equal(first.adapter("with"), first.adapter("without"))
    assert first.metrics("with") == first.metrics("without")


def test_ranks_and_alphas_of_modules_are_kept(first, tmp_path):
    """A file of another trainer, in fp16, whose modules have ranks and alphas of their own."""
    tensors = {key: tensor.half() for key, tensor in load_file(first.folder("first") / "first.safetensors").items()}
    names = sorted(key.removesuffix(".alpha") for key in tensors if key.endswith(".alpha"))
    for name in names[:2]:
        tensors[f"{name}.lora_down.weight"] = tensors[f"{name}.lora_down.weight"][:3].clone()
        tensors[f"{name}.lora_up.weight"] = tensors[f"{name}.lora_up.weight"][:, :3].clone()
        tensors[f"{name}.alpha"] = torch.tensor(1.5)
    del tensors[f"{names[2]}.alpha"]  # then the scale is 1
    save_file(tensors, tmp_path / "mixed.safetensors")
    weights = weights_at_start(first, "mixed", starting(tmp_path / "mixed.safetensors"))
    given = read_adapter(tmp_path / "mixed.safetensors").entries
    written = read_adapter(first.folder("mixed") / "mixed.safetensors").entries
    # Where modules differ, the scale is in the second matrix: diffusers reads such alphas wrongly.
    assert [(each.name, each.rank, each.scale) for each in written] == [(p.name, p.rank, 1) for p in given]
    assert sorted({(p.rank, p.alpha) for p in given}) == [(3, 1.5), (4, 2.0), (4, 4.0)]
    found = {tuple(tensor.shape) + tuple(tensor.flatten()[:2].tolist()) for tensor in weights.values()}
    for pair in given:
        for matrix in (pair.down.float(), pair.up.float()):
            assert tuple(matrix.shape) + tuple(matrix.flatten()[:2].tolist()) in found
    with at_micro_batch(first, 2, 0, kill), pytest.raises(Killed):
        first.train("mixed", starting(tmp_path / "mixed.safetensors", **{"train.steps": 2}))
    assert first.train("mixed", starting(tmp_path / "mixed.safetensors", **{"train.steps": 2})) == 0


def test_step_0_is_the_adapter_of_the_file_and_the_base_is_the_base(first):
    assert first.train("measured", starting(first.folder("first"), **EVALUATED)) == 0
    losses = []
    for name in ("first", "measured"):
        rows = Results(first.folder(name) / "evaluation.parquet").read().to_pydict()
        at_0 = [number for number, step in enumerate(rows["step"]) if step == 0]
        losses += [[rows[key][number] for number in at_0] for key in ("base_loss", "loss")]
    base, new, base_again, started = losses
    assert base == new == base_again != started


def test_what_cannot_be_started_from_is_refused(first, tmp_path):
    file = first.folder("first") / "first.safetensors"
    for changes, words in (
        (
            {"lora.rank": 8},
            "lora.rank is 8, and .*first.safetensors, from which the run starts, has rank 4: remove lora.rank",
        ),
        ({"lora.alpha": 4.0}, "lora.alpha is 4, and .* has alpha 2: "),
        ({"lora.targets": "attention"}, r"lora.targets is attention, which are \d+ modules, and .* adapts \d+ modules"),
        ({"lora.start_from": f"{file.parent}@7"}, "has no adapter file of step 7; it has the finished one of step 2"),
    ):
        with pytest.raises(UserError, match=words):
            first.train("refused", starting(file) | changes)
    text = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    pair = {f"{text}.lora_down.weight": torch.ones(2, 32), f"{text}.lora_up.weight": torch.ones(64, 2)}
    save_file(load_file(file) | pair, tmp_path / "text.safetensors")
    with pytest.raises(UserError, match=f"{text}., and only the UNet is trained: set text_encoders.train"):
        first.train("refused", starting(tmp_path / "text.safetensors"))
    pair = {"unet.conv_in.lora_A.weight": torch.ones(2, 4, 3, 3), "unet.conv_in.lora_B.weight": torch.ones(16, 2, 1, 1)}
    save_file(pair, tmp_path / "strange.safetensors")
    with pytest.raises(UserError, match="adapts conv_in, which is not trained here"):
        first.train("refused", starting(tmp_path / "strange.safetensors"))
    large = {name: tensor.double() * 1e300 for name, tensor in load_file(file).items() if not name.endswith(".alpha")}
    save_file(large, tmp_path / "large.safetensors")
    with pytest.raises(UserError, match="large.safetensors has values in .* that fp32"):
        first.train("refused", starting(tmp_path / "large.safetensors"))
    # The file that a run starts from must stay where it is.
    with pytest.raises(
        UserError, match="which is in the folder of this run, where files of an earlier launch are moved"
    ):
        first.train("first", starting(first.folder("first")))
    # "first" was trained on images that are held out here.
    with pytest.raises(
        UserError, match=r"was trained on \d of the \d images of .* without measuring .--evaluation.held_out 0"
    ):
        first.train("refused", starting(file, **EVALUATED | {"evaluation.held_out": 0.6}))
    assert not first.folder("refused").exists()
    # Rank, alpha and targets that are those of the file are no contradiction: a run's config.yaml has them.
    assert first.train("agrees", SHORT | {"lora.start_from": str(file)}) == 0
