"""Adapter files of any trainer: every layer gets what the file says, in every naming, or the file is refused in one sentence."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
from cases import case
from changed_layers import assert_changed, layers_of, without_hooks
from safetensors.torch import load_file, save_file

from sushi_research import models
from sushi_research.adapters import description, loading, reading
from sushi_research.adapters.entries import changed_weight, delta
from sushi_research.errors import UserError
from sushi_research.models.loading import resolve_base
from sushi_research.models.original_names import unet_name

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pipelines(bases):
    """The pipeline of each tiny base in fp32."""
    made = {}
    for architecture, folder in bases.items():
        base, model = resolve_base(str(folder)), models.load(architecture)
        made[architecture] = loading.load_pipeline(base, model, model.load_text(base, CPU), torch.float32, CPU)
    return made


@pytest.fixture
def pipeline(pipelines, architecture):
    yield pipelines[architecture]
    without_hooks(pipelines[architecture])


def make_pairs(pipeline, seed=0):
    """(component, path) -> (down, up, alpha or None): ranks 1 to 4, and alphas of all kinds, by turns."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for number, (where, layer) in enumerate(layers_of(pipeline).items()):
        out, *into = layer.weight.shape
        rank = 1 + number % 4
        down = torch.randn(rank, *into, generator=generator)
        up = torch.randn(out, rank, *([1, 1] if len(into) == 3 else []), generator=generator)
        pairs[where] = down, up, (None, 1.0, rank, -0.75, 12.5)[number // 5 % 5]
    return pairs


def kohya(component, path, architecture):
    if component == "unet":
        return "lora_unet_" + (unet_name(path) if architecture == "sdxl" else path).replace(".", "_")
    prefix = "lora_te_" if architecture == "sd15" else {"text_encoder": "lora_te1_"}.get(component, "lora_te2_")
    path = path if path.startswith(("text_model.", "text_projection")) else f"text_model.{path}"
    return prefix + path.replace(".", "_")


def dotted(component, path, _):
    return f"{component}.{path}"


def spaced(component, path, _):
    """diffusers' blocks in kohya's spelling, which other programs write for SDXL too."""
    path = path if component == "unet" else f"text_model.{path.removeprefix('text_model.')}"
    return ("lora_unet_" + path.replace(".", "_")) if component == "unet" else f"{component}.{path}"


# Naming -> (module's name, endings of the matrices).
NAMINGS = {
    "kohya": (kohya, "lora_down.weight", "lora_up.weight"),
    "peft": (dotted, "lora_A.weight", "lora_B.weight"),
    "diffusers": (dotted, "lora.down.weight", "lora.up.weight"),
    "linear layer": (dotted, "lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
    "mixed": (spaced, "lora_down.weight", "lora_up.weight"),
}


def in_naming(naming, pairs, architecture):
    name, down_end, up_end = NAMINGS[naming]
    tensors = {}
    for (component, path), (down, up, alpha) in pairs.items():
        module = name(component, path, architecture)
        tensors |= {f"{module}.{down_end}": down.contiguous(), f"{module}.{up_end}": up.contiguous()}
        if alpha is not None:
            shape = [] if len(tensors) % 2 else [1]
            tensors[f"{module}.alpha"] = torch.full(shape, alpha, dtype=torch.int64 if alpha == int(alpha) else None)
    return tensors


def scale_of(down, alpha):
    return 1.0 if alpha is None else alpha / down.shape[0]


def assert_loaded(pipeline, pairs, lora_scale=1.0):
    """Every layer's difference from the base is scale x up @ down of its pair, and no other layer has one."""
    assert_changed(
        pipeline,
        {
            where: (
                (up.flatten(1) @ down.flatten(1)).view(up.shape[0], *down.shape[1:])
                * scale_of(down, alpha)
                * lora_scale,
                None,
            )
            for where, (down, up, alpha) in pairs.items()
        },
    )


@pytest.mark.parametrize("naming", NAMINGS)
def test_every_layer_gets_its_own_rank_and_alpha(pipeline, architecture, naming, tmp_path):
    # The namings take turns with the layers, which saves time.
    places = range(list(NAMINGS).index(naming), 10**4, len(NAMINGS))
    pairs = {where: pair for place, (where, pair) in enumerate(make_pairs(pipeline).items()) if place in places}
    save_file(in_naming(naming, pairs, architecture), tmp_path / "adapter.safetensors")
    [applied] = loading.load_adapters(pipeline, [str(tmp_path / "adapter.safetensors")])
    applied.activate()
    assert_loaded(pipeline, pairs)
    applied.activate(0.5)
    assert_loaded(pipeline, pairs, 0.5)
    applied.deactivate()
    assert_loaded(pipeline, {})


def old_name(key):
    """diffusers' names from before it used peft."""
    for inner, old in (("to_q", "to_q"), ("to_k", "to_k"), ("to_v", "to_v"), ("to_out.0", "to_out")):
        key = key.replace(f".{inner}.lora.", f".processor.{old}_lora.")
    for inner in "q", "k", "v", "out":
        key = key.replace(f"self_attn.{inner}_proj.lora.", f"self_attn.to_{inner}_lora.")
    return key


def test_the_oldest_names(pipeline, architecture, tmp_path):
    pairs = {where: (down, up, None) for where, (down, up, _) in make_pairs(pipeline).items() if "attn" in where[1]}
    tensors = {old_name(key): value for key, value in in_naming("diffusers", pairs, architecture).items()}
    assert {".processor.to_out_lora.", "self_attn.to_out_lora."} <= {
        part for key in tensors for part in (".processor.to_out_lora.", "self_attn.to_out_lora.") if part in key
    }
    save_file(tensors, tmp_path / "adapter.safetensors")
    loading.load_adapters(pipeline, [str(tmp_path / "adapter.safetensors")])[0].activate()
    assert_loaded(pipeline, pairs)


def test_several_adapters_keep_their_scales(pipeline, architecture, tmp_path):
    first = {where: pair for where, pair in make_pairs(pipeline).items() if "mid_block" in where[1]}
    second = {where: pair for where, pair in make_pairs(pipeline, seed=1).items() if where[0] == "text_encoder"}
    paths = [str(tmp_path / name) for name in ("first.safetensors", "second.safetensors")]
    for path, pairs in zip(paths, (first, second), strict=True):
        save_file(in_naming("kohya", pairs, architecture), path)
    assert reading.adapts_text(paths[1])
    one, two = loading.load_adapters(pipeline, paths)
    one.activate()
    assert_loaded(pipeline, first)
    two.activate(2.0)
    twice = {where: (down, 2 * up, alpha) for where, (down, up, alpha) in second.items()}
    assert_loaded(pipeline, first | twice)
    one.remove()
    assert_loaded(pipeline, twice)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("architecture", ["sd15"])
def test_every_float_is_read_as_its_value(pipeline, architecture, dtype, tmp_path):
    pairs = {
        where: (down.to(dtype), up.to(dtype), alpha)
        for where, (down, up, alpha) in make_pairs(pipeline).items()
        if "mid_block" in where[1]
    }
    save_file(in_naming("kohya", pairs, architecture), tmp_path / "adapter.safetensors")
    loading.load_adapters(pipeline, [str(tmp_path / "adapter.safetensors")])[0].activate()
    assert_loaded(pipeline, {where: (down.float(), up.float(), alpha) for where, (down, up, alpha) in pairs.items()})


SETTINGS = {"r": 3, "lora_alpha": 6, "peft_type": "LORA", "bias": "none", "use_dora": False, "init_lora_weights": True}


def written_by_diffusers(pipeline, path, **settings):
    """A file of the mid block's pairs with rank 3, and 2 for `to_q`, and peft's settings in its metadata."""
    pairs = {
        where: (down[:1].repeat(rank, *[1] * (down.dim() - 1)), up[:, :1].repeat(1, rank, *[1] * (up.dim() - 2)), None)
        for where, (down, up, _) in make_pairs(pipeline).items()
        if where[1].startswith("mid_block")
        for rank in (2 if where[1].endswith("to_q") else 3,)
    }
    entries = SETTINGS | {"rank_pattern": {"to_q": 2}, "target_modules": [path for _, path in pairs]} | settings
    metadata = {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in entries.items()})}
    save_file(in_naming("peft", pairs, "sdxl"), path, metadata)
    return pairs


@pytest.mark.parametrize("rslora", [False, True])
def test_the_settings_of_peft_give_the_scale(pipeline, rslora, tmp_path):
    path = tmp_path / "adapter.safetensors"
    pairs = written_by_diffusers(pipeline, path, alpha_pattern={"attn1.to_q": 5.0}, use_rslora=rslora)
    entries = loading.matches_of(pipeline, path)["unet"]
    # diffusers' own reader of its own file agrees.
    pipeline.load_lora_weights(str(path), adapter_name="theirs")
    for _, where in pairs:
        rank = 2 if where.endswith("to_q") else 3
        alpha = 5.0 if where.endswith("attn1.to_q") else 6.0
        assert entries[where].scale == pytest.approx(alpha / (math.sqrt(rank) if rslora else rank), rel=1e-12)
        assert pipeline.unet.get_submodule(where).scaling["theirs"] == pytest.approx(entries[where].scale, rel=1e-12)
    pipeline.unload_lora_weights()


def refusal(pipeline, path):
    with pytest.raises(UserError) as caught:
        loading.load_adapters(pipeline, [str(path)])
    sentence = str(caught.value)
    assert sentence.startswith(str(path)) and sentence.endswith(".") and "\n" not in sentence and len(sentence) < 700
    assert not any(layer._forward_hooks for layer in pipeline.unet.modules()), "nothing was loaded"
    return sentence.removeprefix(str(path))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"use_dora": True}, "was saved with unet.use_dora = True, but unet.mid_block"),
        ({"init_lora_weights": "pissa"}, "unet.init_lora_weights = 'pissa'"),
        ({"bias": "lora_only"}, "unet.bias = 'lora_only'"),
        ({"r": 4}, "the rank 4, but its matrices have rank 3"),
        ({"lora_alpha": None}, "no usable unet.lora_alpha"),
        ({"lora_alpha": float("nan")}, "no usable unet.lora_alpha"),
        ({"alpha_pattern": {"(": 1}}, "no usable unet.lora_alpha or unet.alpha_pattern"),
        ({"use_rslora": "yes"}, "use_rslora = 'yes'"),
    ],
)
@pytest.mark.parametrize("architecture", ["sdxl"])
def test_settings_that_need_more_than_pairs(pipeline, settings, said, tmp_path):
    path = tmp_path / "adapter.safetensors"
    written_by_diffusers(pipeline, path, **settings)
    assert said in refusal(pipeline, path)


ONE = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
DOWN, UP, ALPHA = f"{ONE}.lora_down.weight", f"{ONE}.lora_up.weight", f"{ONE}.alpha"
TWO = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
NORM = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_norm1"
NAN, INFINITY = float("nan"), float("inf")


def with_value(tensor, value):
    tensor = tensor.clone()
    tensor.view(-1)[3] = value
    return tensor


def hada(name, *ranks):
    """A LoHa of another layer, with these ranks of its two products."""
    shapes = {
        f"w{number}_{end}": shape
        for number, rank in zip("12", ranks, strict=True)
        for end, shape in (("a", (8, rank)), ("b", (rank, 8)))
    }
    return {f"{name}.hada_{part}": torch.ones(shape) for part, shape in shapes.items()}


# What is wrong -> (changes of a file's tensors, None to remove one; what is said).
DEFECTS = {
    "NaN": (lambda t: {UP: with_value(t[UP], NAN)}, rf"holds NaN in {UP} \(1 of 64 values"),
    "infinity": (lambda t: {DOWN: with_value(t[DOWN], -INFINITY)}, rf"holds infinity in {DOWN} \(1 of 64 values"),
    "alpha NaN": (lambda t: {ALPHA: torch.tensor(NAN)}, rf"holds NaN in {ALPHA}"),
    "alpha infinite": (lambda t: {ALPHA: torch.tensor(INFINITY)}, rf"holds infinity in {ALPHA}"),
    "alpha 0": (lambda t: {ALPHA: torch.tensor(0.0)}, rf"gives {ONE} the alpha 0"),
    "alpha of fp64, too large": (
        lambda t: {ALPHA: torch.tensor(1e300, dtype=torch.float64)},
        r"1e\+300, which float32 cannot",
    ),
    "alpha of fp64, too small": (
        lambda t: {ALPHA: torch.tensor(1e-300, dtype=torch.float64)},
        "1e-300, which float32 cannot",
    ),
    "alphas": (lambda t: {ALPHA: torch.ones(2)}, rf"holds {ALPHA} with 2 values"),
    "no alpha": (lambda t: {ALPHA: torch.ones(0)}, rf"holds {ALPHA} with 0 values"),
    "alpha alone": (lambda t: {DOWN: None, UP: None}, rf"holds {ALPHA} without the down matrix"),
    "down alone": (lambda t: {UP: None}, r"alpha without the up matrix"),
    "up alone": (lambda t: {DOWN: None}, r"alpha without the down matrix"),
    "integers": (lambda t: {UP: t[UP].to(torch.int8)}, rf"holds {UP} in I8, and matrices are read in"),
    "complex": (lambda t: {UP: t[UP].to(torch.complex64)}, rf"holds {UP} in C64"),
    "two ranks": (
        lambda t: {DOWN: t[DOWN][:1].contiguous()},
        rf"matrices of {ONE} .* rank is 1 in one and 2 in the other",
    ),
    "rank 0": (
        lambda t: {DOWN: t[DOWN][:0], UP: t[UP][:, :0]},
        rf"matrices of {ONE} have the shapes \[0, 32\] and \[32, 0\]",
    ),
    "vectors": (lambda t: {DOWN: t[DOWN][0]}, r"which are not those of a LoRA"),
    "other width": (lambda t: {DOWN: torch.ones(2, 9)}, rf"matrices of {ONE} are \[2, 9\] and .* needs \[2, 32\]"),
    "a convolution's": (
        lambda t: {DOWN: t[DOWN][..., None, None].expand(-1, -1, 3, 3).contiguous(), UP: t[UP][..., None, None]},
        r"this base needs \[2, 32\]",
    ),
    "unknown key": (
        lambda t: {f"{ONE}.gate": torch.ones(1)},
        rf"holds {ONE}\.gate, which is not part of an adapter",
    ),
    "unknown module": (
        lambda t: {DOWN.replace("to_q", "to_x"): t[DOWN], UP.replace("to_q", "to_x"): t[UP]},
        r": 1 of \d+ modules not found in this SD1.5 base \(lora_unet_\S+_to_x\)",
    ),
    "FLUX's": (
        lambda t: {
            f"lora_unet_double_blocks_0_img_attn_qkv.lora_{way}.weight": torch.ones(2, 2) for way in ("down", "up")
        },
        r"holds lora_unet_double_blocks_0_\S+, which is no module of the UNet of SD1.5 or of SDXL",
    ),
    "second encoder": (
        lambda t: {f"lora_te2_x.lora_{way}.weight": torch.ones(2, 2) for way in ("down", "up")},
        r"1 of 13 modules not found in this SD1.5 base \(lora_te2_x\)",
    ),
    "SDXL's encoder": (
        lambda t: {
            f"lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_{way}.weight": torch.ones(*shape)
            for way, shape in (("down", (2, 32)), ("up", (32, 2)))
        },
        r"1 of 13 modules not found in this SD1.5 base \(lora_te1_text_model",
    ),
    "prefix": (
        lambda t: {f"base_model.model.x.lora_{way}.weight": torch.ones(2, 2) for way in "AB"},
        r"holds base_model\.model\.x\.lora_A\.weight, which is not part of an adapter in a naming",
    ),
    "a module twice": (
        lambda t: {
            f"unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_{way}.weight": t[key]
            for way, key in (("A", DOWN), ("B", UP))
        },
        rf"holds {ONE} and unet\.mid_block\S+, which are the same module",
    ),
    "a matrix twice": (
        lambda t: {f"{ONE}.lora_A.weight": t[DOWN]},
        rf"holds \S+ and {ONE}\S+, which are the same matrix",
    ),
    "magnitude": (
        lambda t: {f"{ONE}.dora_scale": torch.ones(3)},
        rf"the magnitude of {ONE} is \[3\], and .* needs 32 numbers",
    ),
    "magnitudes": (
        lambda t: {f"{ONE}.dora_scale": torch.ones(2, 3)},
        r"of the shape \[2, 3\], and a magnitude is one number",
    ),
    "Tucker": (lambda t: {f"{ONE}.lora_mid.weight": torch.ones(3)}, r"are not those of a Tucker decomposition"),
    "bias": (
        lambda t: {f"{ONE}.lora_B.bias": torch.ones(3)},
        rf"changes the bias of {ONE} by 3 numbers, and .* has none",
    ),
    "two kinds": (lambda t: {f"{ONE}.diff": torch.ones(32, 32)}, r"which are parts of two kinds of adapter"),
    "LoHa in part": (lambda t: {f"{TWO}.hada_w1_a": torch.ones(3, 3)}, r"holds \S+hada_w1_a without the w1_b matrix"),
    "LoHa of two ranks": (lambda t: hada(TWO, 2, 3), r"which are not those of a LoHa"),
    "LoHa elsewhere": (lambda t: hada(TWO, 2, 2), r"are \[8, 2\], .* the weight that they change is \[16, 16\]"),
    "LoKr in part": (lambda t: {f"{TWO}.lokr_w1": torch.ones(2, 2)}, r"holds \S+lokr_w1 without the w2 matrix"),
    "LoKr of an absurd size": (
        lambda t: {f"{TWO}.lokr_w{number}": torch.ones(2048, 2048) for number in (1, 2)},
        r"are \[2048, 2048\], \[2048, 2048\], and the weight that they change is \[16, 16\]",
    ),
    "difference of another shape": (
        lambda t: {f"{TWO}.diff": torch.ones(32)},
        r"are \[32\], and the weight .* \[16, 16\]",
    ),
    "LoRA of a norm": (
        lambda t: {f"{NORM}.lora_{way}.weight": torch.ones(32, 32) for way in ("down", "up")},
        r"the weight that they change is \[16\]",
    ),
    "alpha of a difference": (
        lambda t: {f"{TWO}.diff": torch.ones(32, 32), f"{TWO}.alpha": torch.ones(())},
        r"holds \S+alpha beside a whole difference",
    ),
    "embedding": (
        lambda t: {"bundle_emb.x.string_to_param.*": torch.ones(3)},
        r"holds the new token 'x' with the shapes \[3\]",
    ),
}


@pytest.fixture(scope="module")
def sound(pipelines):
    """The tensors of an adapter file for SD1.5 with rank 2 and alpha 1 in every module of the mid block's attention."""
    pairs = {
        where: (torch.ones(2, *down.shape[1:]), torch.ones(up.shape[0], 2, *up.shape[2:]), 1.0)
        for where, (down, up, _) in make_pairs(pipelines["sd15"]).items()
        if "mid_block.attentions" in where[1]
    }
    return in_naming("kohya", pairs, "sd15")


@pytest.mark.parametrize("defect", DEFECTS)
@pytest.mark.parametrize("architecture", ["sd15"])
def test_defects(pipeline, sound, defect, tmp_path):
    change, said = DEFECTS[defect]
    tensors = {key: value.clone() for key, value in (sound | change(sound)).items() if value is not None}
    save_file(tensors, tmp_path / "adapter.safetensors")
    sentence = refusal(pipeline, tmp_path / "adapter.safetensors")
    assert re.search(said, sentence), sentence


@pytest.mark.parametrize("architecture", ["sd15"])
def test_matrices_of_a_1x1_convolution_and_of_a_linear_layer_are_the_same(pipeline, sound, tmp_path):
    """SD1.5's proj_in is a convolution and its to_q a linear layer: files may hold either as a matrix or with a 1x1 kernel."""
    matrices = [key for key in sound if not key.endswith(".alpha")]
    turned = {key: sound[key].flatten(1) if sound[key].ndim > 2 else sound[key][..., None, None] for key in matrices}
    assert {each.ndim for each in turned.values()} == {2, 4}
    found = []
    for name, tensors in (("as_written", sound), ("turned", sound | turned)):
        save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / f"{name}.safetensors")
        matches = loading.matches_of(pipeline, tmp_path / f"{name}.safetensors")
        found.append({path: (each.down, each.up, each.scale) for path, each in matches["unet"].items()})
    for path, (down, up, scale) in found[0].items():
        other = found[1][path]
        assert torch.equal(down, other[0]) and torch.equal(up, other[1]) and scale == other[2], path


HADA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


@pytest.mark.parametrize("architecture", ["sd15"])
def test_so_are_the_other_kinds_and_magnitudes(pipeline, tmp_path):
    """As above: LoHa, LoKr, and the magnitude of each axis, with and without a kernel's ones, have the values of their numbers."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    def read(path, tensors):
        file = {f"lora_unet_{path.replace('.', '_')}.{end}": each.clone() for end, each in tensors.items()}
        save_file(file, tmp_path / "adapter.safetensors")
        return loading.matches_of(pipeline, tmp_path / "adapter.safetensors")["unet"][path]

    modules = list(pipeline.unet.named_modules())
    for end in ("attn1.to_q", "proj_in", "conv1"):
        path, shape = next((path, tuple(layer.weight.shape)) for path, layer in modules if path.endswith(end))
        (out, into), ones = shape[:2], (1,) * len(shape[2:])
        weight, down, up = random(*shape), random(2, *shape[1:]), random(out, 2, *ones)
        changed = weight + (up.flatten(1) @ down.flatten(1)).reshape(shape)
        for axis, sizes in enumerate(((out, 1), (1, into))):
            own = random(*sizes, *ones).abs() + 0.5
            others = [place for place in range(len(shape)) if place != axis]
            expected = changed * own / torch.linalg.vector_norm(changed, dim=others, keepdim=True)
            for ends in ((), (1, 1)):
                with case((end, sizes, ends)):
                    magnitude = {"dora_scale": own.reshape(*sizes, *ends)}
                    entry = read(path, {"lora_down.weight": down, "lora_up.weight": up, **magnitude})
                    torch.testing.assert_close(changed_weight(entry, weight), expected)
        if end == "conv1":
            continue
        one, two, first, second = random(out, 2), random(2, into), random(2, 2), random(out // 2, into // 2)
        for ends in ((), (1, 1)):
            with case((end, ends)):
                a, b, whole = (each.reshape(*each.shape, *ends) for each in (one, two, second))
                entry = read(path, dict(zip(HADA, (a, b, a, b), strict=True)))
                torch.testing.assert_close(delta(entry, shape), ((one @ two) ** 2).reshape(shape))
                entry = read(path, {"lokr_w1": first, "lokr_w2": whole})
                torch.testing.assert_close(delta(entry, shape), torch.kron(first, second).reshape(shape))


# Files without any entry: the name of a tensor, and what is said.
OTHERS = {
    f"{ONE}.down_list.0.weight": "holds a DyLoRA (LyCORIS)",
    f"{ONE}.lambda_layer": "holds a T-LoRA (LyCORIS)",
    f"{ONE}.oft_R.weight": "holds an OFT",
    f"{ONE}.oft_blocks": "holds an OFT",
    f"{ONE}.oft_diag": "holds an OFT",
    f"{ONE}.a1.weight": "holds a GLoRA (LyCORIS)",
    f"{ONE}.on_input": "holds an IA3",
    f"{ONE}.set_weight": "holds whole weights in place of differences (ComfyUI)",
    f"{ONE}.scalar": "holds a LoRA with a learned scale (LyCORIS)",
    "emb_params": "holds a textual inversion embedding",
    "clip_g": "holds a textual inversion embedding",
    "control_model.x": "is a ControlNet, not a LoRA",
    "model.diffusion_model.input_blocks.0.0.weight": "is a whole model (a checkpoint), not a LoRA",
    "first_stage_model.encoder.conv_in.weight": "is a VAE alone, not a LoRA",
    "text_model.encoder.layers.0.mlp.fc1.weight": "is a text encoder alone, not a LoRA",
    "foo": "is of an unknown kind (its tensors: foo and 0 more), not a LoRA",
}


@pytest.mark.parametrize("architecture", ["sd15"])
def test_files_of_another_kind(pipeline, tmp_path):
    path = tmp_path / "adapter.safetensors"
    for key, said in OTHERS.items():
        save_file({key: torch.ones(2, 2)}, path)
        assert said in refusal(pipeline, path)
    save_file({}, path)
    assert "is empty (no tensors): download it again" in refusal(pipeline, path)


@pytest.mark.parametrize("architecture", ["sd15"])
def test_values_that_the_base_s_dtype_cannot_hold(pipeline, sound, tmp_path):
    save_file(sound | {UP: with_value(sound[UP], 70_000.0)}, tmp_path / "adapter.safetensors")
    pipeline.unet.half()
    try:
        assert "has values up to 7e+04 in" in refusal(pipeline, tmp_path / "adapter.safetensors")
    finally:
        pipeline.unet.float()


def test_what_inspection_shows(sound, tmp_path):
    path = tmp_path / "adapter.safetensors"
    save_file(sound, path, {"ss_base_model_version": "sd_v1"})
    assert load_file(path).keys() == sound.keys() and reading.is_adapter(path)
    lines = dict(description.describe(path))
    count = len(sound) // 3
    assert lines["modules"] == f"UNet ({count})" and lines["rank"] == f"2 ({count})"
    assert lines["scale (alpha / rank)"] == f"0.5 ({count})"
    assert lines["trained on"] == "ss_base_model_version = sd_v1"
