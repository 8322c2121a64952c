"""Where the adapter sits, how it starts, and what it adds to a layer."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from sushi_research.adapters import lora, targets
from sushi_research.adapters.kinds import low_rank
from sushi_research.adapters.kinds.initial import initial_down
from sushi_research.adapters.settings import AdapterSettings
from sushi_research.errors import UserError
from testing.real_configs import NARROW_UNETS, UNETS

SETTINGS = {"targets": "attention", "rank": 4, "alpha": 2.0, "dropout": 0.0, "init": "default", "seed": 0}


def unet(architecture="sd15", configs=NARROW_UNETS, device="meta"):
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    with torch.device(device):
        return UNet2DConditionModel.from_config(configs[architecture])


def attached(architecture="sd15", device="meta", configs=NARROW_UNETS, **changes):
    model = unet(architecture, configs, device)
    lora.attach(model, AdapterSettings(**(SETTINGS | changes)))
    return model


def state(model):
    return {name: parameter.detach().clone() for name, parameter in lora.adapter_parameters({"unet": model}).items()}


# Parameters of the UNet; for each preset the modules, and the trainable parameters per unit of rank.
COUNTS = {
    "sd15": (
        859_520_964,
        {
            "attention": (128, 199_296),
            "attention_ff": (160, 199_296 + 174_720),
            "kohya": (192, 423_936),
            "kohya_conv": (278, 423_936 + 544_000 + 82_880),
        },
    ),
    "sdxl": (
        2_567_463_684,
        {
            "attention": (560, 1_451_520),
            "attention_ff": (700, 1_451_520 + 1_164_800),
            "kohya": (722, 2_659_840),
            "kohya_conv": (788, 2_659_840 + 355_840 + 58_560),
        },
    ),
}


@pytest.mark.parametrize("architecture", COUNTS)
def test_counts_at_the_real_sizes(architecture, monkeypatch):
    # The counts need no values: drawing them for the real shapes would be most of this test's time.
    monkeypatch.setattr(low_rank, "initial_down", lambda seed, path, shape, init: torch.empty(shape, device="meta"))
    model = unet(architecture, UNETS)
    parameters, presets = COUNTS[architecture]
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters, (
        "the configs in the tests are the real ones"
    )
    paths = targets.adaptable_paths(model)
    assert all(path.split(".")[0] in ("down_blocks", "mid_block", "up_blocks") for path in paths)
    lora.attach(model, AdapterSettings(**SETTINGS | {"targets": "kohya_conv", "rank": 2}))
    assert list(lora.adapter_modules(model)) == paths, "kohya_conv is every layer of the blocks"
    assert lora.count_parameters({"unet": model}) == 2 * presets["kohya_conv"][1]
    # The other presets are parts of it; which layers `attach` takes for a preset's endings is tested below.
    sizes = dict.fromkeys(paths, 0)
    for name, parameter in lora.adapter_parameters({"unet": model}).items():
        sizes[name.rsplit(".lora_", 1)[0]] += parameter.numel()
    found = {}
    for preset, endings in targets.PRESETS.items():
        chosen = [path for path in paths if path.endswith(tuple(f".{ending}" for ending in endings))]
        found[preset] = (len(chosen), sum(sizes[path] for path in chosen) // 2)
    assert found == presets


def test_names_of_the_tensors_and_their_order():
    names = list(lora.adapter_parameters({"unet": attached()}))
    assert len(names) == 2 * 128
    assert len(lora.adapter_modules(attached(targets="attention_ff"))) == 160
    assert len(lora.adapter_modules(attached(targets="kohya"))) == 192
    assert names[:2] == [
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_B.weight",
    ]


def test_a_list_of_targets_is_taken_as_it_is():
    model = attached(targets=["attn2.to_k", "mid_block.attentions.0.proj_in"])
    paths = list(lora.adapter_modules(model))
    assert len(paths) == 17
    assert all(path.endswith("attn2.to_k") or path == "mid_block.attentions.0.proj_in" for path in paths)


def test_only_the_adapter_trains_and_it_is_fp32_on_a_bf16_unet():
    model = unet(device="cpu").to(torch.bfloat16)
    lora.attach(model, AdapterSettings(**SETTINGS | {"targets": "kohya_conv"}))
    ours = {id(parameter) for parameter in lora.adapter_parameters({"unet": model}).values()}
    for parameter in model.parameters():
        assert parameter.requires_grad == (id(parameter) in ours)
        assert parameter.dtype == (torch.float32 if id(parameter) in ours else torch.bfloat16)


def test_the_start_depends_on_the_seed_and_the_module_alone():
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = state(attached(device="cpu"))
    torch.manual_seed(2)
    # More targets, another order of drawing, another state of the process-wide generator: the same start.
    second = state(attached(device="cpu", targets="attention_ff"))
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())
    other = state(attached(device="cpu", seed=1))
    downs = [name for name in first if "lora_A" in name]
    assert not any(torch.equal(other[name], first[name]) for name in downs)
    assert len({tuple(first[name].flatten()[:4].tolist()) for name in downs}) == len(downs)
    model = unet(device="cpu")
    torch.random.set_rng_state(before)
    lora.attach(model, AdapterSettings(**SETTINGS | {"targets": ["attn2.to_k"]}))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_golden_start():
    # Fixed for randomness.SCHEME 1: a change of these breaks comparisons between runs that share a seed.
    path = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    uniform = initial_down(7, path, (2, 4), "default")
    normal = initial_down(7, path, (2, 4), "gaussian")
    assert uniform[0].tolist() == GOLDEN_UNIFORM
    assert normal[0].tolist() == GOLDEN_NORMAL


GOLDEN_UNIFORM = [-0.48376399278640747, 0.12949585914611816, -0.3083181381225586, 0.04637247323989868]
GOLDEN_NORMAL = [-0.015931466594338417, 0.32823309302330017, 0.16249175369739532, -0.48737338185310364]


@pytest.mark.parametrize("layer", [nn.Linear(640, 320), nn.Conv2d(64, 32, 3)], ids=["linear", "conv"])
@pytest.mark.parametrize("init", ["default", "gaussian"])
def test_the_start_is_distributed_as_in_peft(layer, init):
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(0)
    rank = 32
    config = LoraConfig(r=rank, target_modules=["0"], init_lora_weights=True if init == "default" else "gaussian")
    peft = inject_adapter_in_model(config, nn.Sequential(layer))[0].lora_A["default"].weight.detach()
    ours = initial_down(0, "0", tuple(peft.shape), init)
    assert ours.shape == peft.shape and ours.dtype == torch.float32
    assert float(ours.mean()) == pytest.approx(0, abs=5 * float(peft.std()) / math.sqrt(ours.numel()))
    # 18,432 or more draws: the deviation is known to 1/sqrt(2n), half a per cent; four of these are allowed.
    assert float(ours.std()) == pytest.approx(float(peft.std()), rel=0.02)
    if init == "default":
        bound = 1 / math.sqrt(math.prod(ours.shape[1:]))
        for weights in (ours, peft):  # uniform up to the bound: the largest of n draws lies within 1e-3 of it
            assert bound * 0.999 < float(weights.abs().max()) <= np.float32(bound)
    else:
        assert float(ours.abs().max()) > 3 / rank


def test_b_starts_at_zero_so_the_unet_computes_what_it_did():
    model = unet(device="cpu").eval()
    inputs = (torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 5, 16))
    with torch.no_grad():
        before = model(*inputs).sample
        lora.attach(model, AdapterSettings(**SETTINGS | {"targets": "kohya_conv"}))
        assert torch.equal(model(*inputs).sample, before)
    assert all(not tensor.any() for name, tensor in state(model).items() if "lora_B" in name)
    assert all(tensor.any() for name, tensor in state(model).items() if "lora_A" in name)


@pytest.mark.parametrize(
    ("path", "shape"),
    [("down_blocks.0.resnets.0.conv1", (1, 8, 6, 6)), ("mid_block.resnets.0.time_emb_proj", (2, 32))],
)
def test_a_layer_adds_alpha_over_rank_times_b_a_x(path, shape):
    model = attached(device="cpu", targets="kohya_conv", rank=4, alpha=6.0)
    layer = lora.adapter_modules(model)[path]
    x = torch.randn(shape)
    with torch.no_grad():
        up = layer.lora_B["default"].weight.normal_()
        down = layer.lora_A["default"].weight
        base = layer.get_base_layer()
        if len(shape) == 4:
            delta = torch.nn.functional.conv2d(torch.nn.functional.conv2d(x, down, padding=1), up)
        else:
            delta = x @ down.T @ up.T
        # Two orders of summation in fp32.
        torch.testing.assert_close(layer(x), base(x) + 6.0 / 4 * delta, rtol=1e-5, atol=1e-5)


def test_dropout_is_in_every_layer():
    layers = lora.adapter_modules(attached(dropout=0.25)).values()
    assert {layer.lora_dropout["default"].p for layer in layers} == {0.25}


def test_presets_by_name():
    assert targets.resolve_targets("attention") == ["to_q", "to_k", "to_v", "to_out.0"]
    assert targets.resolve_targets(["to_q", "conv1"]) == ["to_q", "conv1"]
    with pytest.raises(
        UserError, match=r"atention is not a preset .*\(did you mean attention\?\): choose from attention, "
    ):
        targets.resolve_targets("atention")


UNMET = [
    ("to_qq", r"^lora\.targets: the adapter target to_qq fits no module of the UNet \(did you mean to_q\?\)"),
    ("q", r"^lora\.targets: the adapter target q fits no module"),  # an ending of whole names, not of letters
    ("conv_in", r"^lora\.targets: the adapter target conv_in fits conv_in, which cannot have an adapter"),
    ("linear_1", r"fits time_embedding\.linear_1, which cannot"),
    ("attn1", r"fits down_blocks\.0\.attentions\.0\.transformer_blocks\.0\.attn1, which cannot"),
    ("norm", r"which cannot have an adapter"),
]


def test_a_target_that_cannot_be_met_is_named():
    model = unet()
    for target, sentence in UNMET:
        with pytest.raises(UserError, match=sentence):
            lora.attach(model, AdapterSettings(**SETTINGS | {"targets": ["to_q", target]}))
            pytest.fail(f"{target} was accepted")
    assert not lora.adapter_modules(model)
    with pytest.raises(
        UserError, match=r"^text_encoders\.targets: the adapter target q_pro fits no module of the text_encoder_2 "
    ):
        targets.target_layers(model, ["q_pro"], "text_encoder_2")
