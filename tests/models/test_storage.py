"""A base held in fewer bits: what a stored layer computes, keeps and takes, and how it is loaded."""

import sys

import pytest
import torch
from base_files import CPU, real_model, refusal
from single_files import narrow_base, write_single_file
from torch import nn
from torch.nn import functional as F

from sushi_research.adapters import lora
from sushi_research.adapters.loading import load_adapters, load_pipeline
from sushi_research.adapters.settings import AdapterSettings
from sushi_research.evaluation import drift
from sushi_research.models import loading, sd15, storage
from sushi_research.planning import op_counts

STORAGES = ["int8", "fp8", "nf4"]
# The root mean square error of normally distributed weights, relative to theirs: 0.6 %, 2.7 % and 9.2 % in bf16.
BOUND = {"int8": 0.007, "fp8": 0.028, "nf4": 0.095}


def weight(*shape, dtype=torch.float32):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 0.05).to(dtype)


def layer(kind, dtype):
    """A plain layer and a shape that it takes."""
    if kind == "linear":
        made, shape = nn.Linear(64, 96, dtype=dtype), (2, 5, 64)
    else:
        made, shape = nn.Conv2d(16, 32, 3, stride=2, padding=1, dtype=dtype), (2, 16, 8, 8)
    made.weight = nn.Parameter(weight(*made.weight.shape, dtype=dtype), requires_grad=False)
    made.bias.requires_grad_(False)
    return made, shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("held", "kind"), [("int8", "linear"), ("fp8", "linear"), ("nf4", "linear"), ("int8", "conv")])
def test_a_stored_layer_is_the_plain_layer_with_its_restored_weight(held, kind, dtype):
    plain, shape = layer(kind, dtype)
    before = plain.weight.clone()
    stored = storage.stored_layer(plain, plain.weight, held)
    assert torch.equal(plain.weight, before)  # storing changes no tensor of the file
    restored = stored.restored()
    assert restored.shape == before.shape and restored.dtype == dtype
    assert (restored - before).float().norm() < BOUND[held] * before.float().norm()

    plain.weight = nn.Parameter(restored, requires_grad=False)
    x = weight(*shape, dtype=dtype)
    results = []
    for each in (stored, plain):
        given = x.clone().requires_grad_()
        out = each(given)
        out.float().square().sum().backward()
        results.append((out.detach(), given.grad))
    # The same kernels on the same numbers.
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("held", STORAGES)
def test_zeros_tiny_and_large_weights(held):
    plain = nn.Linear(64, 64, bias=False, dtype=torch.float16)
    values = torch.zeros(64, 64, dtype=torch.float16)
    values[1], values[2, ::2], values[3] = 6e-8, 896.0, 448 / 2**10
    restored = storage.stored_layer(plain, values, held).restored()
    assert restored.isfinite().all() and (restored[0] == 0).all()
    if held != "nf4":  # its scales are in 8 bits, so that those of small blocks are lost next to large ones
        assert (restored[1] - values[1]).abs().max() < 1e-7
        assert torch.equal(restored[3], values[3])
    assert torch.allclose(restored[2], values[2], rtol=0.01)


@pytest.mark.parametrize("held", STORAGES)
def test_backward_keeps_no_restored_weight(held):
    plain = [layer("linear", torch.float32)[0], nn.GELU(), nn.Linear(96, 64)]
    stored = [storage.stored_layer(plain[0], plain[0].weight, held), *plain[1:]]
    x = weight(2, 5, 64).requires_grad_()
    saved = {}
    for name, layers in (("plain", plain), ("stored", stored)):
        model = nn.Sequential(*layers)
        saved[name] = op_counts.count(lambda model=model: model(x).sum().backward(), model.parameters()).saved_bytes
    # The counter leaves out the parameters, which the plain layer saves; a restored weight would count.
    assert saved["stored"] <= saved["plain"]


@pytest.mark.parametrize(
    ("architecture", "held", "form"),
    [("sd15", "int8", "folder"), ("sd15", "fp8", "file"), ("sd15", "nf4", "folder"), ("sdxl", "nf4", "file")],
)
def test_a_base_is_stored_while_it_is_read(architecture, held, form, tmp_path, monkeypatch):
    folder = narrow_base(tmp_path / "folder", architecture)
    path = folder if form == "folder" else write_single_file(folder, tmp_path / "base.safetensors", architecture)
    base = loading.resolve_base(str(path), **({} if form == "folder" else {"tokenizers": str(folder)}))
    full = loading.load_unet(base, torch.bfloat16, CPU)
    put, taken = storage.put, []

    def watched(model, name, *rest):
        put(model, name, *rest)
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        others = module.buffers(recurse=False) if leaf == "weight" else ()
        taken.append(sum(tensor.nbytes for tensor in (getattr(module, leaf), *others)))

    monkeypatch.setattr(storage, "put", watched)
    unet = loading.load_unet(base, torch.bfloat16, CPU, storage=held)
    # Each weight has its stored form as soon as it is read.
    expected = storage.weight_bytes(loading.empty_unet(base), torch.bfloat16, held)
    assert sum(taken) == expected == sum(tensor.nbytes for tensor in (*unet.parameters(), *unet.buffers()))
    assert expected < 0.7 * storage.weight_bytes(full, torch.bfloat16, "compute")

    kinds = set()
    for path, layer in unet.named_modules():
        plain = full.get_submodule(path)
        if isinstance(layer, storage.StoredLinear | storage.StoredConv2d):
            kinds.add((type(layer), layer.storage))
            assert torch.equal(layer.restored(), storage.stored_layer(plain, plain.weight, layer.storage).restored())
            assert layer.bias is None or torch.equal(layer.bias, plain.bias)
    assert kinds == {(storage.StoredLinear, held), (storage.StoredConv2d, "int8")}
    for path in ("conv_in", "conv_out", "time_embedding.linear_1"):
        assert torch.equal(unet.get_submodule(path).weight, full.get_submodule(path).weight)
    assert unet.dtype == torch.bfloat16  # as diffusers' pipelines ask for it


# GiB of the UNet's weights in bf16 and in each storage: the table of docs/small_base.md.
SIZES = {
    "sd15": {"compute": 1.60, "int8": 0.83, "fp8": 0.82, "nf4": 0.70},
    "sdxl": {"compute": 4.78, "int8": 2.47, "fp8": 2.41, "nf4": 1.41},
}


@pytest.mark.parametrize("architecture", SIZES)
def test_the_sizes_of_the_real_models(architecture):
    unet = real_model(architecture, "unet")
    sizes = {held: storage.weight_bytes(unet, torch.bfloat16, held) / 2**30 for held in SIZES[architecture]}
    assert {held: round(size, 2) for held, size in sizes.items()} == SIZES[architecture]


class Step:
    """A forward and backward pass of a small UNet with an adapter."""

    def __init__(self, folder, architecture, held, targets="kohya_conv"):
        self.architecture = architecture
        self.unet = loading.load_unet(loading.resolve_base(str(folder)), torch.float32, CPU, storage=held)
        lora.attach(self.unet, AdapterSettings(targets=targets, rank=4, alpha=4.0, dropout=0.0, init="default", seed=0))
        generator = torch.Generator().manual_seed(1)
        for name, parameter in lora.adapter_parameters({"unet": self.unet}).items():
            if ".lora_B." in name:
                parameter.data.normal_(0, 0.02, generator=generator)
        self.unet.train()

    def gradients(self):
        """The gradient of the whole adapter."""
        generator, unet = torch.Generator().manual_seed(2), self.unet
        noisy, hidden = (
            torch.randn(2, *shape, generator=generator) for shape in ((4, 8, 8), (77, unet.config.cross_attention_dim))
        )
        given = {}
        if self.architecture == "sdxl":
            pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
            given = {"added_cond_kwargs": {"text_embeds": torch.zeros(2, pooled), "time_ids": torch.zeros(2, 6)}}
        out = unet(noisy, torch.tensor([10, 700]), hidden, return_dict=False, **given)[0]
        parameters = list(lora.adapter_parameters({"unet": unet}).values())
        return torch.cat([each.flatten() for each in torch.autograd.grad(out.square().sum(), parameters)])


@pytest.mark.parametrize("architecture", ["sd15", "sdxl"])
def test_gradients_of_a_unet(architecture, tmp_path):
    """Adapters on stored layers of all kinds; and the same gradients bit for bit with gradient checkpointing."""
    folder = narrow_base(tmp_path / "folder", architecture)
    truth = Step(folder, architecture, "compute").gradients()
    for held, bound in (("int8", 0.06), ("fp8", 0.2), ("nf4", 0.6)):  # observed: 0.046, 0.14, 0.45
        step = Step(folder, architecture, held)
        found = step.gradients()
        assert 0 < (found - truth).norm() / truth.norm() < bound, held
        step.unet.enable_gradient_checkpointing()
        assert torch.equal(step.gradients(), found), held


def test_an_adapter_file_loads_onto_a_stored_base(bases, tmp_path):
    """What scripts/evaluate.py does with model.base_storage."""
    from safetensors.torch import save_file

    base = loading.resolve_base(str(bases["sd15"]))
    text = sd15.load_text(base, CPU)
    pipeline = load_pipeline(base, sd15, text, torch.float32, CPU, "nf4")
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    plain = pipeline.unet.get_submodule(path)
    pair = {"lora_A": weight(4, plain.in_features), "lora_B": weight(plain.out_features, 4)}
    save_file({f"unet.{path}.{name}.weight": tensor for name, tensor in pair.items()}, tmp_path / "a.safetensors")
    load_adapters(pipeline, [str(tmp_path / "a.safetensors")])[0].activate()
    x = weight(3, plain.in_features)
    expected = F.linear(x, storage.weight_of(plain), plain.bias) + x @ pair["lora_A"].T @ pair["lora_B"].T
    assert torch.allclose(pipeline.unet.get_submodule(path)(x), expected, atol=1e-6)


def test_the_images_of_the_drift_are_those_of_the_stored_base(bases):
    base = loading.resolve_base(str(bases["sd15"]))

    def keys(**given):
        return drift.make_drift_set(["a"], str, sd15, base, "hash", side=64, dtype=torch.float32, **given)

    assert len({keys(storage=each).hash for each in ("compute", *STORAGES)}) == 4
    assert keys() == keys(storage="compute")


def test_what_does_not_run_here_is_refused(monkeypatch):
    storage.require_usable("compute", torch.float32, CPU)
    for held in STORAGES:
        storage.require_usable(held, torch.float16, CPU)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "bitsandbytes.functional", None)
        message = refusal(storage.require_usable, "nf4", torch.float32, CPU)
        assert message.startswith("model.base_storage is nf4, which does not run here (")
        assert message.endswith("take int8 or compute.")
        storage.require_usable("int8", torch.float32, CPU)
    with monkeypatch.context() as patch:
        patch.delattr(torch, "float8_e4m3fn")
        message = refusal(storage.require_usable, "fp8", torch.float32, CPU)
        assert "has no attribute 'float8_e4m3fn'" in message
        storage.require_usable("int8", torch.float32, CPU)


def test_a_stored_weight_is_never_cast():
    plain, _ = layer("linear", torch.float32)
    stored = storage.stored_layer(plain, plain.weight, "nf4")
    stored.to("cpu")
    with pytest.raises(AssertionError, match="cannot be cast"):
        stored.to(torch.bfloat16)
