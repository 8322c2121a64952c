"""The training scripts against scripts/basic_lora.py, the method in plain PyTorch, diffusers and peft, in every mode.

test_reference.py tests where the data comes from: pictures, noise, timesteps. Here the samples are those of the scripts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from script_runs import Trainer, script

from sushi_research.adapters import lora, targets
from sushi_research.adapters.kinds.initial import initial_down
from sushi_research.fast import checkpointing
from sushi_research.fast.batch import Batch
from sushi_research.fast.decision import RECORDED
from sushi_research.objectives import NUM_TIMESTEPS
from sushi_research.training import recorded_step
from sushi_research.training.loader import Loader
from testing.rerun import Rerun

STEPS, SEED, RANK, SAMPLES = 5, 3, 4, 4
# Large, so that B is no longer near zero in the second step, where A has gradients for the first time.
RATE = 20.0

# All are compared with the same losses and gradients: neither how samples are divided, nor where activations come from, nor how
# the optimizer sees the tensors changes what is computed. Every mode of each setting is in one of them.
ACCUMULATED = {"train.batch_size": SAMPLES // 2, "train.accumulation": 2}
STATIC = "static batch, one flat parameter, feed-forward layers recomputed, accumulated"
MODES: dict[str, dict[str, Any]] = {
    "one flat parameter": {"train.gradient_checkpointing": "none"},
    "single tensors, all recomputed, accumulated": {
        "optimizer.name": "script_runs.RecordingSGD",
        "train.gradient_checkpointing": "all",
        **ACCUMULATED,
    },
    STATIC: {"train.gradient_checkpointing": "feed_forward", **ACCUMULATED},
}
assert {mode["train.gradient_checkpointing"] for mode in MODES.values()} == set(checkpointing.MODES)


class Oracle:
    """Five steps of scripts/basic_lora.py with plain gradient descent, on the batches of a run."""

    def __init__(self, architecture: str, base: Path, batches: list[list[Batch]]) -> None:
        from diffusers import AutoencoderKL, UNet2DConditionModel

        self.architecture = architecture
        self.scaling_factor = AutoencoderKL.load_config(base / "vae")["scaling_factor"]
        self.unet = script("basic_lora").add_lora(UNet2DConditionModel.from_pretrained(base / "unet"))
        self.tensors = {name: tensor for name, tensor in self.unet.named_parameters() if tensor.requires_grad}
        for name, tensor in self.tensors.items():
            if ".lora_A." in name:
                path = name.partition(".lora_A.")[0]
                tensor.data = initial_down(SEED, path, tuple(tensor.shape), "default")
        self.losses, self.gradients = [], []
        for step in batches:
            loss = sum(self.loss(batch) * len(batch) / SAMPLES for batch in step)
            loss.backward()
            self.losses.append(loss.item())
            self.gradients.append({name: tensor.grad for name, tensor in self.tensors.items()})
            for tensor in self.tensors.values():
                tensor.data -= RATE * tensor.grad
                tensor.grad = None

    def loss(self, batch: Batch) -> torch.Tensor:
        """The mean loss of a batch."""
        latents = (batch.mean.float() + batch.std.float() * batch.normal("posterior")) * self.scaling_factor
        text: dict[str, Any] = {"encoder_hidden_states": batch.text["hidden"].float()}
        if self.architecture == "sdxl":
            text["added_cond_kwargs"] = {"text_embeds": batch.text["pooled"].float(), "time_ids": batch.time_ids}
        timesteps = batch.integers("timestep", NUM_TIMESTEPS)
        return script("basic_lora").noise_loss(self.unet, latents, batch.normal("noise"), timesteps, text)


@pytest.mark.parametrize("architecture", ["sd15", "sdxl"])
@pytest.mark.slow
def test_losses_and_gradients_are_those_of_the_basic_script_in_every_mode(
    architecture: str, trainer: Trainer, bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[list[Batch]] = []
    gradients: list[torch.Tensor] = []
    step, clip = Loader.step, torch.nn.utils.clip_grad_norm_

    def record_batches(loader: Loader, index: int) -> Any:
        found = list(step(loader, index))
        batches.append(found)
        return iter(found)

    def record_gradients(parameters: Any, *arguments: Any, **options: Any) -> torch.Tensor:
        parameters = list(parameters)
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in parameters]))
        return clip(parameters, *arguments, **options)

    monkeypatch.setattr(Loader, "step", record_batches)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", record_gradients)
    monkeypatch.setattr(script("basic_lora"), "RANK", RANK)
    always = {
        "optimizer.name": "torch.optim.SGD",
        "optimizer.lr": RATE,
        "train.max_grad_norm": None,
        "train.steps": STEPS,
        "train.seed": SEED,
        "train.batch_size": SAMPLES,
        "lora.targets": "attention",
        "lora.rank": RANK,
        "lora.alpha": RANK,
        "checkpoint.every": None,
    }
    oracle: Oracle | None = None
    graphs: list[Rerun] = []
    for number, (mode, settings) in enumerate(MODES.items()):
        batches.clear(), gradients.clear()
        with monkeypatch.context() as patch:
            if (
                mode == STATIC
            ):  # the runner of recorded steps, with a stand-in for CUDA graphs that runs the static batch again
                patch.setattr(recorded_step, "decide", lambda *_: RECORDED)
                patch.setattr(
                    recorded_step, "make_graphs", lambda _, buffers: graphs.append(Rerun(buffers.all)) or graphs[0]
                )
            assert trainer.train(f"run-{number}", {**always, **settings}) == 0
        if oracle is None:
            oracle = Oracle(architecture, bases[architecture], batches[-STEPS:])
            assert any(len(each) > 1 for each in batches), "some steps have several shapes"
        # fp32 throughout, but sums in another order differ in the seventh digit, and five steps add such differences up. Seen:
        # losses equal to 2e-7, gradients to 1e-4 of a tensor's largest. A wrong weight, sample or scale shows in the first digits.
        losses = [line["loss"] for line in trainer.metrics(f"run-{number}")]
        assert losses == pytest.approx(oracle.losses, rel=2e-6), mode
        for index, found in enumerate(gradients[-STEPS:]):
            sizes = [gradient.numel() for gradient in oracle.gradients[index].values()]
            for (name, expected), piece in zip(oracle.gradients[index].items(), found.split(sizes), strict=True):
                largest = expected.abs().max()
                assert (piece - expected.flatten()).abs().max() <= 5e-4 * largest, f"{mode}, step {index}, {name}"
    assert graphs[0].replayed >= STEPS
    # B is zero before the first step, so A has no gradient in it; SD1.5's smallest maps have one place, which attends to itself.
    for index, named in enumerate(oracle.gradients):
        learning = {name for name, gradient in named.items() if gradient.any()}
        assert len(learning) > 0.9 * len(named) / (2 if index == 0 else 1)


@pytest.mark.parametrize("architecture", ["sd15", "sdxl"])
def test_the_basic_script_trains_a_file_that_diffusers_loads(
    architecture: str, base_folder: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    import diffusers

    basic = script("basic_lora")
    monkeypatch.setattr(basic, "STEPS", 2)
    basic.main(architecture, str(base_folder), str(photos), str(tmp_path / "out"))
    assert capsys.readouterr().out.count("loss") == 2
    name = {"sd15": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}[architecture]
    pipeline = getattr(diffusers, name).from_pretrained(base_folder)
    layers = targets.matching(targets.ATTENTION, targets.adaptable_paths(pipeline.unet))
    pipeline.load_lora_weights(tmp_path / "out")
    modules = lora.adapter_modules(pipeline.unet)
    assert modules.keys() == layers
    learning = 0
    for layer in modules.values():
        (down,), (up,) = layer.lora_A.values(), layer.lora_B.values()
        assert down.weight.shape[0] == basic.RANK and list(layer.scaling.values()) == [1.0]
        learning += bool(up.weight.any())
    assert learning > 0.9 * len(modules)
