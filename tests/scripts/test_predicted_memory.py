"""The predicted peak memory against the live tensor bytes of the scripts' own step on a CPU."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from script_runs import load_script
from test_training_step import Recorder, batch_of

from sushi_research import models, objectives
from sushi_research.adapters import lora
from sushi_research.adapters.settings import AdapterSettings
from sushi_research.fast import checkpointing
from sushi_research.models import components
from sushi_research.planning import memory
from sushi_research.planning.live_bytes import LiveBytes
from sushi_research.planning.step_cost import micro_batch_cost
from sushi_research.planning.step_trace import Shape
from sushi_research.training import optim
from sushi_research.training.master_weights import MasterWeights

SIDE = 16  # of the latents


def attached(unet: Any, mode: str, kind: str) -> Any:
    lora.attach(unet, AdapterSettings(targets="attention", rank=4, alpha=4.0, kind=kind))
    checkpointing.enable(unet.train(), mode, draws=False)
    return unet


def counted(architecture: str, unet: Any, side: int) -> int:
    """The peak of the second whole step, from the batch on, with everything that is held. The first makes the optimizer's state."""
    job = SimpleNamespace(
        global_batch_size=2, compute_dtype=torch.float32, scaler=torch.amp.GradScaler("cpu", enabled=False)
    )
    objective = objectives.Objective(objectives.diffusion_schedule(), "epsilon")
    latents = {name: torch.ones(2, 4, side, side) for name in ("mean", "std")}
    batch = replace(batch_of(unet), **latents)
    with LiveBytes(unet.parameters()) as counter:
        master_weights = MasterWeights(lora.adapter_parameters({"unet": unet}), torch.float32)
        optimizer = optim.build_optimizer("adamw", master_weights, 1e-4, {})
        for _ in range(2):
            counter.peak = counter.live
            load_script(architecture).training_step(job, unet, batch, objective, Recorder())
            master_weights.accumulate()
            optimizer.step()
            master_weights.refresh()
            master_weights.zero_grad()
    return counter.peak


def predicted(
    architecture: str, config: dict[str, Any], text: dict[str, tuple[int, ...]], mode: str, side: int, kind: str
) -> float:
    unet = attached(components.build_empty("unet", config), mode, kind)
    numbers = lora.count_parameters({"unet": unet})
    weights = 4 * (sum(parameter.numel() for parameter in unet.parameters()) - numbers)
    held = memory.Held(weights, memory.adapter_bytes(numbers, 4), numbers * memory.STATE_BYTES["adamw"]).total
    cost = micro_batch_cost(unet, models.load(architecture), text, dtype=torch.float32)
    return held + cost.peak_bytes(Shape(2, side, side, 77))


@pytest.mark.parametrize(
    ("architecture", "mode", "kind"),
    [
        *(
            ("sd15", "none", "lora"),
            ("sd15", "feed_forward", "lora"),
            ("sdxl", "none", "lora"),
            ("sdxl", "all", "lora"),
        ),
        *(("sd15", "none", "dora"), ("sd15", "all", "loha")),
    ],
)
def test_the_live_bytes_of_a_step(architecture, base_folder, mode, kind):
    from diffusers import UNet2DConditionModel

    unet = attached(UNet2DConditionModel.from_pretrained(base_folder, subfolder="unet"), mode, kind)
    text = {name: tuple(tensor.shape[1:]) for name, tensor in batch_of(unet).text.items()}
    found = counted(architecture, unet, SIDE)
    assert predicted(architecture, dict(unet.config), text, mode, SIDE, kind) == pytest.approx(found, rel=0.1)
