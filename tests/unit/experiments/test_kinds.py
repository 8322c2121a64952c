"""The experiment about kinds of adapters: what it compares has equal numbers of parameters, and its page says what is recorded."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from demo.kinds_study import PAGE, Results, claims, rates, table
from sushi_research.adapters.settings import settings_of
from sushi_research.adapters.targets import resolve_targets, target_layers
from sushi_research.adapters.tensor_names import module_name
from sushi_research.config.command_line import load_config
from sushi_research.experiments.experiment import Experiment, plan
from sushi_research.training import text_encoders

ROOT = Path(__file__).parents[3]
EXPERIMENT = "configs/experiments/kinds.yaml"


@pytest.fixture
def variants(monkeypatch) -> dict:
    """The config of each variant's run with the first seed."""
    monkeypatch.chdir(ROOT)
    experiment = load_config(Experiment, ["--config", EXPERIMENT], script="", intro="\n".join("12345"))
    return {run.variant: run.config for run in plan(experiment) if run.seed == experiment.seeds[0]}


def parameters(config, component, settings, name) -> int:
    """The numbers that a run with this config trains in a component, by the formulas of docs/kinds.md."""
    count = 0
    for path, layer in target_layers(component, resolve_targets(settings.targets), name).items():
        found = settings.of_layer(module_name(name, path), layer)
        out, into, *kernel = layer.weight.shape
        size = math.prod(kernel)
        if config.lora.kind == "lokr":
            a, b = config.lora.lokr_factor, config.lora.lokr_factor
            c, d = out // a, into // b
            whole = found.rank >= max(c, d) / 2
            count += a * b + (c * d if whole else found.rank * (c + d)) * size
        else:
            pairs = 2 if config.lora.kind == "loha" else 1
            magnitudes = into if config.lora.kind == "dora" else 0
            count += pairs * found.rank * (into * size + out) + magnitudes
    return count


def test_all_variants_have_the_same_number_of_parameters_within_one_percent(variants):
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    base = ROOT / "demo/base/sdxl"
    classes = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(base, subfolder="unet"))
        encoders = {part: kind(CLIPTextConfig.from_pretrained(base / part)) for part, kind in classes.items()}
    counts = {name: parameters(each, unet, settings_of(each.lora, 0), "unet") for name, each in variants.items()}
    text = variants["text"]
    settings = text_encoders.adapter_settings(text)
    counts["text"] += sum(parameters(text, encoder, settings, part) for part, encoder in encoders.items())
    assert counts["plain"] == 219_136 and len(counts) == 8
    assert {name: count for name, count in counts.items() if abs(count / counts["plain"] - 1) > 0.01} == {}
    found = Results()  # the runs counted the tensors themselves
    assert {name: found.parameters(name) for name in counts} == counts


def test_the_variants_differ_in_what_they_are_named_after(variants):
    kinds = {name: config.lora.kind for name, config in variants.items()}
    assert kinds == dict.fromkeys(variants, "lora") | {"dora": "dora", "loha": "loha", "lokr": "lokr"}
    assert [name for name, config in variants.items() if config.text_encoders.train] == ["text"]
    # A scale of 1 everywhere, so that the learning rate means the same; of rsLoRA the scale is what is compared.
    for config in variants.values():
        pairs = [(config.lora.rank, config.lora.alpha), *((each.rank, each.alpha) for each in config.lora.overrides)]
        pairs += [
            (config.lora.conv_rank, config.lora.conv_alpha),
            (config.text_encoders.rank, config.text_encoders.alpha),
        ]
        assert all(rank == alpha for rank, alpha in pairs)


def test_the_page_says_what_is_recorded():
    text, found = PAGE.read_text(encoding="utf-8"), Results()
    for row in (*table(found), *rates(found)):
        assert f"| {' | '.join(row)} |\n" in text
    assert [claim for claim in claims(found) if f"- {claim}\n" not in text] == []
