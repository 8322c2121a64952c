"""The training step of each script on one batch: loss weights, masks, and the base's prediction as target."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from script_runs import CONFIGS, load_script

from sushi_research import models, objectives
from sushi_research.adapters import lora
from sushi_research.adapters.settings import AdapterSettings
from sushi_research.fast import checkpointing
from sushi_research.fast.batch import Batch
from sushi_research.models import loading
from sushi_research.models.prediction import Prediction
from sushi_research.objectives.timesteps import logit_normal
from sushi_research.runs.job import Job

NAMES = ("one", "two")
EPSILON = Prediction()


class Recorder:
    """What the step gives to its metrics."""

    def add(self, loss: torch.Tensor, losses: torch.Tensor, bins: torch.Tensor, *_: Any) -> None:
        self.loss, self.losses = loss.detach(), losses.detach()


def batch_of(unet: Any) -> Batch:
    generator = torch.Generator().manual_seed(1)
    text = {"hidden": torch.randn(2, 77, unet.config.cross_attention_dim, generator=generator)}
    if unet.config.addition_embed_type:
        width = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
        text["pooled"] = torch.randn(2, width, generator=generator)
    return Batch(
        mean=torch.randn(2, 4, 8, 8, generator=generator),
        std=torch.ones(2, 4, 8, 8),
        text=text,
        time_ids=torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2),
        loss_weights=torch.ones(2),
        names=NAMES,
        keys=tuple((0, name, 0) for name in NAMES),
        seed=0,
        device=torch.device("cpu"),
        prefetched={},
    )


Step = Callable[[Batch], tuple[Recorder, list[torch.Tensor]]]


def prepare(
    architecture: str,
    base_folder: Path,
    precision: str,
    *,
    trained: bool,
    dropout: float = 0.0,
    recompute: str = "none",
    prediction: Prediction = EPSILON,
    **sections: dict[str, Any],
) -> Any:
    """(the step: batch -> its metrics and gradients, a batch), with an adapter at its start or `trained`."""
    settings = {"model": {"base": str(base_folder)}, "data": {"path": "none"}, "train": {"steps": 1, "batch_size": 2}}
    sections = {"loss": {"snr_gamma": 5.0}, **sections}
    config = CONFIGS[architecture](**settings, lora={"dropout": dropout}, **sections)
    job, script = Job(config, models.load(architecture), Accelerator(cpu=True), precision), load_script(architecture)
    unet = loading.load_unet(loading.find_base(config, job.model), job.compute_dtype, job.device)
    options = {"targets": ["attn2.to_k"], "rank": 4, "alpha": 4.0, "init": "default", "seed": 0}
    lora.attach(unet, AdapterSettings(dropout=dropout, **options))
    unet.train()
    checkpointing.enable(unet, recompute, draws=dropout > 0)
    parameters = list(lora.adapter_parameters({"unet": unet}).values())
    for parameter in parameters:
        parameter.data = parameter.data.to(job.compute_dtype)
        if trained and not parameter.any():
            parameter.data = torch.full_like(parameter, 0.1)
    objective = objectives.make_objective(config, prediction, job.device, dropout)

    def step(batch: Batch) -> tuple[Recorder, list[torch.Tensor]]:
        for parameter in parameters:
            parameter.grad = None
        metrics = Recorder()
        batch.seed_torch("dropout", 0)
        script.training_step(job, unet, batch, objective, metrics)
        assert all(parameter.requires_grad for parameter in parameters)
        return metrics, [parameter.grad.clone() for parameter in parameters]

    return step, batch_of(unet)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("architecture", ["sd15"])
def test_at_its_start_an_adapter_has_nothing_to_learn_from_the_base(architecture, base_folder, precision):
    step, batch = prepare(architecture, base_folder, precision, trained=False)
    metrics, gradients = step(replace(batch, to_base=torch.tensor([True, True])))
    assert metrics.losses.tolist() == [0, 0]
    assert not any(gradient.any() for gradient in gradients)
    metrics, gradients = step(replace(batch, to_base=torch.tensor([False, True])))
    assert metrics.losses[0] > 0 and metrics.losses[1] == 0
    assert any(gradient.any() for gradient in gradients)


def test_the_base_s_prediction_leaves_no_trace(architecture, base_folder):
    """A trained adapter is pulled back to the base, and neither the other sample nor its dropout changes."""
    step, batch = prepare(architecture, base_folder, "fp32", trained=True, dropout=0.5)
    plain, gradients = step(batch)
    mixed, other = step(replace(batch, to_base=torch.tensor([False, True])))
    assert mixed.losses[0] == plain.losses[0] and 0 < mixed.losses[1] != plain.losses[1]
    assert any(not torch.equal(one, two) for one, two in zip(gradients, other, strict=True))
    again, same = step(batch)
    assert torch.equal(again.losses, plain.losses)
    assert all(map(torch.equal, gradients, same))


@pytest.mark.parametrize("architecture", ["sd15"])
def test_recomputed_activations_are_those_with_the_adapter(architecture, base_folder):
    """The backward pass recomputes them after the base's prediction, when the adapter is on again."""
    found = []
    for mode in ("none", "all"):
        step, batch = prepare(architecture, base_folder, "fp32", trained=True, recompute=mode)
        found.append(step(replace(batch, to_base=torch.tensor([False, True])))[1])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_loss_weights_and_masks_are_in_the_loss_that_is_minimised(architecture, base_folder):
    step, batch = prepare(architecture, base_folder, "fp32", trained=True)
    plain, _ = step(batch)
    first, gradients = step(replace(batch, loss_weights=torch.tensor([1.0, 0.0])))
    second, others = step(replace(batch, loss_weights=torch.tensor([0.0, 0.5])))
    assert torch.equal(first.losses, plain.losses)  # the unweighted ones are logged by timestep
    torch.testing.assert_close(first.loss + 2 * second.loss, plain.loss)
    left = torch.zeros(2, 1, 8, 8)
    left[..., :4] = 1
    masked, _ = step(replace(batch, mask=left))
    right, _ = step(replace(batch, mask=1 - left))
    torch.testing.assert_close((masked.losses + right.losses) / 2, plain.losses)
    assert not torch.equal(masked.losses, plain.losses)
    # Only the sample with a weight has gradients: halves of the same gradient sum up to that of both.
    _, both = step(replace(batch, loss_weights=torch.tensor([1.0, 0.5])))
    for one, two, sum_of in zip(gradients, others, both, strict=True):
        torch.testing.assert_close(one + two, sum_of)


def drawn(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(timesteps, noise of the target, noise of the input) of ALL_CHOICES, by the batch's random numbers."""
    table = logit_normal(801, 0.5, 1.5)
    timesteps = 100 + torch.searchsorted(table, batch.uniform("timestep"), right=True)
    offset = 0.1 * batch.uniform("noise_offset_strength")[:, None] * batch.normal("noise_offset", (4,))
    noise = batch.normal("noise") + offset[:, :, None, None]
    return timesteps, noise, noise + 0.2 * batch.normal("input_perturbation")


ALL_CHOICES = {
    "loss": {
        "type": "pseudo_huber",
        "huber_c": 0.2,
        "huber_schedule": "exponential",
        "weighting": "p2",
        "p2_k": 2.0,
        "p2_gamma": 0.5,
        "noise_offset": 0.1,
        "noise_offset_random": True,
        "input_perturbation": 0.2,
    },
    "timesteps": {"distribution": "logit_normal", "mean": 0.5, "std": 1.5, "min": 100, "max": 900},
}


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_every_choice_of_the_config_reaches_the_step(
    architecture: str, base_folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss is worked out here from the batch's random numbers and from what the UNet was given and predicted."""
    prediction = Prediction(kind)
    step, batch = prepare(architecture, base_folder, "fp32", trained=True, prediction=prediction, **ALL_CHOICES)
    seen, predict = [], models.load(architecture).predict

    def spy(*arguments: Any, **options: Any) -> torch.Tensor:
        seen.append((arguments, predict(*arguments, **options)))
        return seen[-1][1]

    monkeypatch.setattr(models.load(architecture), "predict", spy)
    metrics, _ = step(batch)
    [((_, noisy, times, *_), predicted)] = seen
    timesteps, noise, added = drawn(batch)
    assert torch.equal(times, timesteps)
    abar = objectives.alphas_cumprod()[timesteps].view(-1, 1, 1, 1)
    latents = (batch.mean + batch.std * batch.normal("posterior")) * models.load(architecture).SCALING_FACTOR
    torch.testing.assert_close(noisy, abar.sqrt() * latents + (1 - abar).sqrt() * added)
    target = noise if kind == "epsilon" else abar.sqrt() * noise - (1 - abar).sqrt() * latents
    c = 0.2 ** (timesteps / 1000).view(-1, 1, 1, 1)
    losses = (2 * c * (((predicted - target) ** 2 + c**2).sqrt() - c)).mean((1, 2, 3))
    torch.testing.assert_close(metrics.losses, losses.detach())
    snr = (abar / (1 - abar)).flatten()
    weights = (2 + snr) ** -0.5 * (1 if kind == "epsilon" else snr / (snr + 1))
    torch.testing.assert_close(metrics.loss, (losses * weights).sum().detach() / 2)


def test_a_step_walks_over_no_modules(architecture, base_folder):
    """`unet.dtype` and the like visit every module of the UNet: 7,530 of SDXL's with an adapter, each time they are read."""
    step, batch = prepare(architecture, base_folder, "bf16", trained=False)
    called = set()
    sys.setprofile(lambda frame, event, _: called.add(frame.f_code.co_name) if event == "call" else None)
    try:
        step(batch)
    finally:
        sys.setprofile(None)
    assert "predict" in called
    assert not called & {"named_modules", "named_parameters", "_named_members", "get_parameter_dtype"}
