"""Entries of every kind on a model: each layer computes with the weight that the file's formula gives, at every LoRA scale."""

from __future__ import annotations

import pytest
import torch
from changed_layers import assert_changed, layers_of, without_hooks
from safetensors.torch import save_file

from sushi_research import models
from sushi_research.adapters import description, loading
from sushi_research.models.loading import resolve_base
from sushi_research.models.storage import weight_of
from sushi_research.sampling.lora_scale import scaled

CPU = torch.device("cpu")
BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0"
LINEAR, CONV, NORM = f"{BLOCK}.attn1.to_out.0", "mid_block.resnets.0.conv1", f"{BLOCK}.norm1"
OF_TEXT = "encoder.layers.0.mlp.fc1"


def load(folder, storage="compute"):
    base, model = resolve_base(str(folder)), models.load("sd15")
    return loading.load_pipeline(base, model, model.load_text(base, CPU), torch.float32, CPU, storage)


@pytest.fixture(scope="module")
def pipeline(bases):
    return load(bases["sd15"])


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))) * 0.3


def kron(first, second):
    """The Kronecker product of [a, b] and [c, d, ...], by its definition."""
    out = torch.einsum("ab,cd...->acbd...", first, second)
    return out.reshape(first.shape[0] * second.shape[0], first.shape[1] * second.shape[1], *second.shape[2:])


def low_rank(shape, rank=3):
    return normal(rank, *shape[1:]), normal(shape[0], rank, *[1] * (len(shape) - 2), seed=1)


def product(up, down, shape):
    return (up.flatten(1) @ down.flatten(1)).reshape(shape)


def dora(weight, change, magnitude, axis):
    """W' = m (W + dW) / ||W + dW||, along the axis of the magnitude."""
    changed = weight + change
    norms = changed.transpose(0, axis).flatten(1).norm(dim=1)
    ones = [-1 if place == axis else 1 for place in range(weight.ndim)]
    return changed * (magnitude.reshape(-1) / norms).reshape(ones) - weight


def kinds(weight, bias):
    """Kind -> (tensors by ending, the change of weight, that of the bias or None), of a linear or convolutional layer."""
    shape, kernel = tuple(weight.shape), tuple(weight.shape[2:])
    out, into = shape[:2]
    down, up = low_rank(shape)
    plain = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(1.5)}
    change = 0.5 * product(up, down, shape)
    rows, columns = weight.flatten(1).norm(dim=1) * 1.3, weight.transpose(0, 1).flatten(1).norm(dim=1) * 0.8
    ones = [1] * len(kernel)
    a1, a2, b1, b2 = (
        normal(out, 2),
        normal(out, 2, seed=1),
        normal(2, into * 9 ** bool(kernel)),
        normal(2, into * 9 ** bool(kernel), seed=2),
    )
    first, second = normal(4, 2), normal(out // 4, into // 2, *kernel)
    found = {
        "LoRA": (plain, change, None),
        "LoRA with a bias": (plain | {"diff_b": normal(out)}, change, normal(out)),
        "LoRA with peft's bias": (plain | {"lora_B.bias": normal(out)}, change, 0.5 * normal(out)),
        "DoRA of outputs": (plain | {"dora_scale": rows.reshape(-1, 1, *ones)}, dora(weight, change, rows, 0), None),
        "DoRA of inputs": (
            plain | {"dora_scale": columns.reshape(1, -1, *ones)},
            dora(weight, change, columns, 1),
            None,
        ),
        "DoRA of peft": (plain | {"lora_magnitude_vector": rows}, dora(weight, change, rows, 0), None),
        "LoHa": (
            {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2, "alpha": torch.tensor(1.0)},
            0.5 * ((a1 @ b1) * (a2 @ b2)).reshape(shape),
            None,
        ),
        "LoKr of whole matrices": (
            {"lokr_w1": first, "lokr_w2": second, "alpha": torch.tensor(7.0)},
            kron(first, second),
            None,
        ),
        "LoKr of products": (
            {
                "lokr_w1_a": normal(4, 3),
                "lokr_w1_b": normal(3, 2),
                "lokr_w2_a": normal(out // 4, 2),
                "lokr_w2_b": normal(2, into // 2 * 9 ** bool(kernel)),
                "alpha": torch.tensor(1.0),
            },
            0.5
            * kron(
                normal(4, 3) @ normal(3, 2),
                (normal(out // 4, 2) @ normal(2, into // 2 * 9 ** bool(kernel))).reshape(out // 4, into // 2, *kernel),
            ),
            None,
        ),
        "LoKr with a magnitude": (
            {"lokr_w1": first, "lokr_w2": second, "dora_scale": columns.reshape(1, -1, *ones)},
            dora(weight, kron(first, second), columns, 1),
            None,
        ),
        "difference": ({"diff": normal(*shape), "diff_b": normal(out)}, normal(*shape), normal(out)),
        "difference of the bias": ({"diff_b": normal(out)}, torch.zeros(shape), normal(out)),
    }
    if kernel:
        core, inner, outer = normal(3, 3, *kernel), normal(3, into, 1, 1), normal(out, 3, 1, 1)
        t1, t2 = normal(2, 2, *kernel), normal(2, 2, *kernel, seed=5)
        p1, p2, r1, r2 = normal(2, out), normal(2, out, seed=3), normal(2, into), normal(2, into, seed=4)
        hadamard = torch.einsum("ijkl,io,jn->onkl", t1, p1, r1) * torch.einsum("ijkl,io,jn->onkl", t2, p2, r2)
        w2_a, w2_b = normal(2, out // 4), normal(2, into // 2)
        found |= {
            "Tucker": (
                {
                    "lora_down.weight": inner,
                    "lora_mid.weight": core,
                    "lora_up.weight": outer,
                    "alpha": torch.tensor(6.0),
                },
                2 * torch.einsum("ijkl,oi,jn->onkl", core, outer[:, :, 0, 0], inner[:, :, 0, 0]),
                None,
            ),
            "LoHa with Tucker": (
                {"hada_w1_a": p1, "hada_w1_b": r1, "hada_w2_a": p2, "hada_w2_b": r2, "hada_t1": t1, "hada_t2": t2},
                hadamard,
                None,
            ),
            "LoKr with Tucker": (
                {"lokr_w1": first, "lokr_w2_a": w2_a, "lokr_w2_b": w2_b, "lokr_t2": t1},
                kron(first, torch.einsum("ijkl,io,jn->onkl", t1, w2_a, w2_b)),
                None,
            ),
            "OneTrainer's LoHa": (
                {
                    "hada_w1_a": a1[:, :, None, None],
                    "hada_w1_b": b1.reshape(2, into, *kernel),
                    "hada_w2_a": a2[:, :, None, None],
                    "hada_w2_b": b2.reshape(2, into, *kernel),
                },
                ((a1 @ b1) * (a2 @ b2)).reshape(shape),
                None,
            ),
        }
    return found


def save(path, tensors):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"ss_v2": "False"})
    return path


@pytest.mark.parametrize("where", [("unet", LINEAR), ("unet", CONV), ("text_encoder", OF_TEXT)])
def test_each_kind_is_what_its_formula_says(pipeline, where, tmp_path):
    component, path = where
    layer = layers_of(pipeline)[where]
    name = {"unet": f"lora_unet_{path}", "text_encoder": f"lora_te_text_model_{path}"}[component].replace(".", "_")
    for kind, (tensors, change, bias) in kinds(layer.weight.detach(), layer.bias).items():
        file = save(tmp_path / "a.safetensors", {f"{name}.{part}": value for part, value in tensors.items()})
        [applied] = loading.load_adapters(pipeline, [file])
        assert_changed(pipeline, {}, only=[where])
        for scale in (1.0, -0.5):
            applied.activate(scale)
            try:
                assert_changed(
                    pipeline, {where: (scale * change, None if bias is None else scale * bias)}, only=[where]
                )
            except AssertionError as error:
                raise AssertionError(f"{kind} at the scale {scale}: {error}") from error
        applied.remove()
        assert dict(description.describe(file))["kind"].endswith(" (1)")
    assert_changed(pipeline, {})


def test_norms_and_several_files_add_up(pipeline, tmp_path):
    weight, bias = normal(32), normal(32, seed=2)
    names = {
        ("unet", NORM): f"lora_unet_{NORM}",
        ("unet", "conv_norm_out"): "lora_unet_conv_norm_out",
        ("text_encoder", "final_layer_norm"): "lora_te_text_model_final_layer_norm",
    }
    sizes = {where: pipeline_layer(pipeline, where).weight.numel() for where in names}
    tensors, changes = {}, {}
    for where, name in names.items():
        values = weight[: sizes[where]].clone(), bias[: sizes[where]].clone()
        changes[where] = values
        tensors |= {
            f"{name.replace('.', '_')}.{part}": value for part, value in zip(("w_norm", "b_norm"), values, strict=True)
        }
    one, two = loading.load_adapters(pipeline, [save(tmp_path / f"{n}.safetensors", tensors) for n in "ab"])
    one.activate()
    two.activate(2.0)
    assert_changed(pipeline, {where: (3 * each, 3 * other) for where, (each, other) in changes.items()})
    with scaled(pipeline.unet, 0.5), scaled(pipeline.text_encoder, 0.0):
        halves = {where: (1.5 * each, 1.5 * other) for where, (each, other) in changes.items() if where[0] == "unet"}
        assert_changed(pipeline, halves)
    without_hooks(pipeline)


def pipeline_layer(pipeline, where):
    return getattr(pipeline, where[0]).get_submodule(where[1])


def test_a_dora_on_a_stored_base_is_one_of_its_restored_weight(bases, tmp_path):
    pipeline = load(bases["sd15"], "int8")
    layer = pipeline.unet.get_submodule(LINEAR)
    weight = weight_of(layer)
    assert weight.shape == layer.weight.shape and weight.dtype != layer.weight.dtype
    down, up = low_rank(weight.shape)
    columns = weight.norm(dim=0) * 1.2
    tensors = {"lora_down.weight": down, "lora_up.weight": up, "dora_scale": columns[None]}
    [applied] = loading.load_adapters(
        pipeline,
        [
            save(
                tmp_path / "a.safetensors", {f"lora_unet_{LINEAR.replace('.', '_')}.{k}": v for k, v in tensors.items()}
            )
        ],
    )
    x = normal(5, weight.shape[1])
    base = layer(x)
    applied.activate()
    torch.testing.assert_close(layer(x) - base, x @ dora(weight, up @ down, columns, 1).T, rtol=1e-4, atol=1e-5)
