"""What each kind of adapter adds to a layer: the formula of its entry, its gradients, its start, and what dropout leaves out."""

import math
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sushi_research.adapters import lora
from sushi_research.adapters.applying import Applied
from sushi_research.adapters.entries import Kronecker, changed_weight, delta, norms
from sushi_research.adapters.kinds import loha
from sushi_research.adapters.kinds.lokr import factorization
from sushi_research.adapters.kohya_format import save_adapter
from sushi_research.adapters.matching import match_components
from sushi_research.adapters.reading import read_adapter
from sushi_research.adapters.settings import AdapterSettings, fits, require_effect
from sushi_research.adapters.tensor_names import parse, starts_at_zero
from sushi_research.adapters.verification import AdapterFileError, verify_saved
from sushi_research.config.lora import Override
from sushi_research.errors import UserError
from sushi_research.models import ARCHITECTURES
from sushi_research.models.storage import stored_layer
from sushi_research.sampling.lora_scale import scaled
from testing.real_configs import NARROW_UNETS

KINDS = ("lora", "dora", "loha", "lokr")
SETTINGS = AdapterSettings(targets="kohya_conv", rank=2, alpha=3.0, conv_rank=3, conv_alpha=2.0)


def unet(device="cpu"):
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    with torch.device(device):
        return UNet2DConditionModel.from_config(NARROW_UNETS["sd15"]).eval()


def predict(model):
    torch.manual_seed(5)
    hidden = torch.randn(2, 5, NARROW_UNETS["sd15"]["cross_attention_dim"])
    with torch.no_grad():
        noisy = torch.randn(2, 4, 8, 8)
        return model(noisy, torch.tensor([3, 700]), hidden).sample


def of_kind(kind, **changes):
    return replace(SETTINGS, kind=kind, **changes)


def fill(model, scale=0.1):
    """Random values in every trained tensor."""
    generator = torch.Generator().manual_seed(1)
    for parameter in lora.adapter_parameters({"unet": model}).values():
        parameter.data = torch.randn(parameter.shape, generator=generator) * scale


@pytest.mark.parametrize("kind", KINDS)
def test_the_unet_is_the_base_at_the_start_and_without_the_adapter_and_else_that_of_the_changed_weights(kind):
    model = unet()
    base = predict(model)
    weights = {path: layer.weight.detach().clone() for path, layer in model.named_modules() if hasattr(layer, "weight")}
    before = torch.random.get_rng_state()
    lora.attach(model, of_kind(kind))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(predict(model), base)
    fill(model, 0.3 if kind == "loha" else 0.1)
    trained = predict(model)
    assert (trained - base).abs().mean() > 0.01 * base.abs().mean()
    with lora.without_adapter(model):
        assert torch.equal(predict(model), base)
    assert torch.equal(predict(model), trained)

    entries = lora.trained_entries({"unet": model})["unet"]
    plain = unet()
    for path, entry in entries.items():
        plain.get_submodule(path).weight.data = changed_weight(entry, weights[path])
    # Other orders of summation in fp32.
    torch.testing.assert_close(predict(plain), trained, rtol=2e-4, atol=2e-4)
    for path in entries:
        plain.get_submodule(path).weight.data = (weights[path] + plain.get_submodule(path).weight.data) / 2
    with scaled(model, 0.5):
        torch.testing.assert_close(predict(model), predict(plain), rtol=2e-4, atol=2e-4)
    assert torch.equal(predict(model), trained)


class One(nn.Module):
    """A UNet of one layer."""

    def __init__(self, layer):
        super().__init__()
        self.mid_block = nn.ModuleList([layer])

    def forward(self, x):
        return self.mid_block[0](x)


LAYERS = {
    "linear": (nn.Linear(12, 18), (2, 5, 12)),
    "conv": (nn.Conv2d(12, 18, 3, stride=2, padding=1), (2, 12, 7, 6)),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("kind", ["dora", "loha", "lokr"])
def test_gradients_are_those_of_the_changed_weight(kind, layer):
    """By automatic differentiation of the entry's formula, with DoRA's norm as a constant."""
    torch.manual_seed(0)
    base, shape = LAYERS[layer]
    x = torch.randn(shape, requires_grad=True)
    factor = torch.randn(base(x).shape)
    model = One(base)
    lora.attach(model, of_kind(kind, targets=["mid_block.0"], conv_rank=None, conv_alpha=None))
    fill(model, 0.3)
    named = lora.adapter_parameters({"unet": model})
    grads = torch.autograd.grad((model(x) * factor).sum(), [x, *named.values()])

    values = {name: tensor.detach().requires_grad_() for name, tensor in named.items()}
    (where, found), *_ = lora.adapter_modules(model).items()
    entry = lora.entry_of(found, where, {parse(name).part: tensor for name, tensor in values.items()})
    weight = base.weight.detach()
    changed = weight + delta(entry, tuple(weight.shape))
    if kind == "dora":
        changed = changed * (entry.magnitude / norms(changed, of_inputs=True).detach())
    arguments = (base.stride, base.padding) if layer == "conv" else ()
    function = nn.functional.conv2d if layer == "conv" else nn.functional.linear
    expected = torch.autograd.grad((function(x, changed, base.bias, *arguments) * factor).sum(), [x, *values.values()])
    for name, got, wanted in zip(["x", *named], grads, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_the_product_of_loha_passes_the_gradient_check():
    torch.manual_seed(0)
    for layer, shape in ((nn.Linear(3, 4), (2, 3)), (nn.Conv2d(3, 4, 3, padding=1), (2, 3, 4, 4))):
        parts = [torch.randn(4, 2), torch.randn(2, 3 if len(shape) == 2 else 27)] * 2
        tensors = [tensor.double().clone().requires_grad_() for tensor in (torch.randn(shape), *parts)]
        assert torch.autograd.gradcheck(lambda x, *p, layer=layer: loha._Product.apply(x, layer, *p), tensors)


def test_sizes_are_split_as_in_peft_and_lycoris():
    from peft.tuners.lokr.layer import factorization as theirs

    sizes, factors = [*range(1, 60), 320, 360, 512, 640, 768, 1024, 1280, 2048, 5120], [-1, 1, 2, 3, 4, 8, 16, 1000]
    assert all(
        factorization(size, factor) == tuple(sorted(theirs(size, factor))) for size in sizes for factor in factors
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_start_depends_on_the_seed_and_the_tensor_alone(kind):
    first, second = One(nn.Linear(64, 32)), One(nn.Linear(64, 32))
    settings = of_kind(kind, targets=["mid_block.0"], rank=4)
    lora.attach(first, settings)
    torch.manual_seed(9)
    lora.attach(second, settings)
    one, other = (lora.adapter_parameters({"unet": each}) for each in (first, second))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert {bool(tensor.any()) for name, tensor in one.items() if starts_at_zero(name)} == {False}
    assert {bool(tensor.any()) for name, tensor in one.items() if not starts_at_zero(name)} == {True}
    text = One(nn.Linear(64, 32))
    text.encoder = nn.Module()
    text.encoder.layers = nn.ModuleList([nn.Linear(64, 32)])
    lora.attach(text, of_kind(kind, targets=["encoder.layers.0"], rank=4), name="text_encoder")
    named = lora.adapter_parameters({"text_encoder": text})
    assert {parse(name)[:2] for name in named} == {("text_encoder", "encoder.layers.0")}
    assert [parse(name).part for name in named] == [parse(name).part for name in one]


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_can_start_from_what_another_one_holds(kind):
    model, again = unet(), unet()
    settings = of_kind(kind, overrides=(Override(modules="mid_block", rank=5, alpha=1.0),))
    lora.attach(model, settings)
    fill(model)
    entries = lora.trained_entries({"unet": model})["unet"]
    lora.attach(again, of_kind(kind), start=entries)
    first, second = (lora.adapter_parameters({"unet": each}) for each in (model, again))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        # The magnitude in a file is absolute: its share of the norm is rounded twice.
        close = {"rtol": 0, "atol": 1e-6 if name.endswith("magnitude") else 0}
        torch.testing.assert_close(second[name], tensor, **close)
    torch.testing.assert_close(predict(again), predict(model), rtol=1e-5, atol=1e-5)


def test_a_lokr_of_a_convolution_is_the_same_however_its_factors_are_shaped():
    """Other trainers write w2 as [c, d * k * k], or w1 and w2_a with the dimensions of a kernel."""
    torch.manual_seed(0)
    layer = nn.Conv2d(15, 8, 3, padding=1)
    w1, w2 = torch.randn(2, 3), torch.randn(4, 5, 3, 3)
    a, b = torch.randn(4, 2), torch.randn(2, 5, 3, 3)
    x = torch.randn(2, 15, 4, 4)
    for same in (
        [Kronecker("", w1, w2=w2), Kronecker("", w1[..., None, None], w2=w2.flatten(1))],
        [Kronecker("", w1, w2_a=a, w2_b=b), Kronecker("", w1, w2_a=a[..., None, None], w2_b=b)],
        [Kronecker("", w1, w2_a=a, w2_b=b), Kronecker("", w1[..., None, None], w2_a=a, w2_b=b.flatten(1))],
    ):
        changes = [delta(entry, tuple(layer.weight.shape)) for entry in same]
        assert torch.equal(*changes)
        for entry in same:
            model = One(deepcopy(layer))
            settings = of_kind("lokr", targets=["mid_block.0"], conv_rank=None, conv_alpha=None)
            lora.attach(model, settings, start={"mid_block.0": entry})
            expected = nn.functional.conv2d(x, layer.weight + changes[0], layer.bias, padding=1)
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_dropouts_leave_out_parts_of_each_sample_while_training(kind):
    torch.manual_seed(0)
    base = nn.Linear(16, 24)
    model = One(base)
    lora.attach(model, of_kind(kind, targets=["mid_block.0"], rank=8, module_dropout=0.5))
    fill(model, 0.5)
    x = torch.randn(1, 5, 16).expand(400, 5, 16)
    with torch.no_grad():
        alone = model.mid_block[0].get_base_layer()(x[:1])
        full = model.eval()(x[:1])
        assert not torch.equal(full, alone)
        samples = model.train()(x)
    # DoRA scales the input for all samples: what is left out is the pair.
    left_out = torch.tensor([not torch.allclose(sample, full[0], atol=1e-5) for sample in samples])
    # Of 400 draws with probability a half, the deviation is 10.
    assert 150 < int(left_out.sum()) < 250
    if kind != "dora":
        assert all(torch.allclose(sample, alone[0], atol=1e-5) for sample in samples[left_out])

    model = One(nn.Linear(16, 24))
    lora.attach(model, of_kind(kind, targets=["mid_block.0"], rank=8, rank_dropout=0.25))
    fill(model, 0.5)
    with torch.no_grad():
        full, samples = model.eval()(x[:1])[0], model.train()(x)
    assert len({tuple(sample[0].tolist()) for sample in samples}) > 20
    # What stays is divided by the probability to stay, so the mean stays.
    spread = samples.std(0) / math.sqrt(len(samples))
    assert ((samples.mean(0) - full).abs() <= 5 * spread + 1e-5).all()


def test_ranks_and_alphas_of_layers():
    linear, one, three = nn.Linear(4, 4), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3)
    settings = of_kind(
        "lora",
        overrides=(
            Override(modules="down_blocks.1", rank=7),
            Override(modules="*.attn2.*", alpha=5.0),
            Override(modules="down_blocks.1.attentions", rank=0),
        ),
    )

    def of(name, layer):
        found = settings.of_layer(name, layer)
        return found and (found.rank, found.alpha)

    assert of("mid_block.proj", linear) == of("mid_block.proj", one) == (2, 3.0)
    assert of("mid_block.conv1", three) == (3, 2.0)
    assert of("down_blocks.1.resnets.0.conv1", three) == (7, 2.0)
    assert of("up_blocks.0.attn2.to_k", linear) == (2, 5.0)
    assert of("down_blocks.1.attentions.0.attn2.to_k", linear) is None
    assert of("down_blocks.10.to_q", linear) == (2, 3.0), "a beginning ends where a part ends"
    stable = of_kind("lora", rank=16, alpha=2.0, rank_stabilized=True).of_layer("mid_block.proj", linear)
    assert stable.alpha / stable.rank == 2.0 / math.sqrt(16)
    assert fits("down_blocks.1.", "down_blocks.1.x") and not fits("attn2", "mid_block.attn2")


def test_settings_that_no_module_has_a_use_for_are_refused():
    settings = of_kind("lora", overrides=(Override(modules="mid_blocks", rank=1),))
    with pytest.raises(
        UserError, match=r"^lora.overrides\[0\].modules is mid_blocks, which fits none of the 1 modules"
    ):
        require_effect(settings, ["mid_block.to_q"], 1)
    encoder = of_kind("lora", overrides=(Override(modules="text_encoder.text_model", rank=1),))
    with pytest.raises(UserError, match=r"but no text encoder is trained: .* set text_encoders.train true\.$"):
        require_effect(encoder, ["mid_block.to_q"], 1)
    with pytest.raises(
        UserError, match=r"fits no trained module of a text encoder: .* such as text_encoder.encoder.x\.$"
    ):
        require_effect(encoder, ["mid_block.to_q", "text_encoder_2.y", "text_encoder.encoder.x"], 1)
    with pytest.raises(UserError, match=r"^lora.conv_rank has no effect, because no module"):
        require_effect(of_kind("lora"), ["mid_block.to_q"], 0)
    model = unet("meta")
    with pytest.raises(UserError, match=r"^lora.overrides give rank 0 to all modules"):
        lora.attach(model, of_kind("lora", overrides=(Override(modules="*", rank=0),)))


# SDXL's files, whose layers are named and read in the same way: test_acceptance.py and test_kohya_format.py.
@pytest.mark.parametrize("kind", KINDS)
def test_the_file_applied_to_the_base_is_what_was_trained(kind, tmp_path):
    model, base = unet(), unet()
    lora.attach(model, of_kind(kind))
    fill(model, 0.3 if kind == "loha" else 0.1)
    state = {name: tensor.detach() for name, tensor in lora.adapter_parameters({"unet": model}).items()}
    path = tmp_path / "adapter.safetensors"
    facts = {"architecture": "sd15", "state": state, "dtype": torch.float32}
    save_adapter(path, {"unet": model}, metadata={}, **facts)
    verify_saved(path, {"unet": model}, **facts)
    matches = match_components(read_adapter(path), ARCHITECTURES["sd15"], {"unet": base})
    applied = Applied(path, {"unet": base}, matches)
    applied.activate()
    torch.testing.assert_close(predict(base), predict(model), rtol=2e-4, atol=2e-4)

    tensors = load_file(path)
    key = next(key for key in sorted(tensors) if not key.endswith(".alpha"))
    tensors[key][0, 0] += 1
    save_file(tensors, path)
    with pytest.raises(AdapterFileError, match="differs from the trained"):
        verify_saved(path, {"unet": model}, **facts)


def test_the_magnitudes_in_a_file_of_bf16_are_not_rounded(tmp_path):
    """They multiply the base's weights: rounded, they would be off by more than a weak adapter changes."""
    model = unet()
    lora.attach(model, of_kind("dora"))
    fill(model, 1e-3)
    state = {name: tensor.detach() for name, tensor in lora.adapter_parameters({"unet": model}).items()}
    path, facts = tmp_path / "adapter.safetensors", {"architecture": "sd15", "state": state, "dtype": torch.bfloat16}
    save_adapter(path, {"unet": model}, metadata={}, **facts)
    verify_saved(path, {"unet": model}, **facts)
    found = {entry.name: entry for entry in read_adapter(path).entries}
    for where, entry in lora.trained_entries({"unet": model})["unet"].items():
        held = found[f"lora_unet_{where.replace('.', '_')}"]
        assert held.down.dtype == held.up.dtype == torch.bfloat16 and held.magnitude.dtype == torch.float32
        assert torch.equal(held.magnitude.flatten(), entry.magnitude.detach().flatten())


@pytest.mark.parametrize("kind", ["dora", "loha", "lokr"])
def test_a_base_in_fewer_bits_is_trained_as_its_restored_weights(kind):
    """The layers are those of `model.base_storage int8`, whose weight has another form and shape."""
    torch.manual_seed(0)
    for base, shape in ((nn.Linear(64, 32), (2, 5, 64)), (nn.Conv2d(64, 32, 3, padding=1), (2, 64, 5, 4))):
        stored = stored_layer(base, base.weight.detach(), "int8")
        base.weight.data = stored.restored()
        x = torch.randn(shape)
        found = []
        for layer in (base, stored):
            model = One(layer)
            with torch.no_grad():
                before = model(x)
                lora.attach(model, of_kind(kind, targets=["mid_block.0"], conv_rank=None, conv_alpha=None))
                assert torch.equal(model(x), before)
            fill(model, 0.3)
            parameters = lora.adapter_parameters({"unet": model})
            found.append([model(x), *torch.autograd.grad(model(x).square().sum(), list(parameters.values()))])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
