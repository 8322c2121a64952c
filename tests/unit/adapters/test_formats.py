"""Names of every trainer: each layer of the published models is found by each of its names, in files of any mixture."""

from __future__ import annotations

import json

import pytest
import torch
from base_files import hole, lay_out
from safetensors.torch import save_file

from sushi_research.adapters.entries import LowRank
from sushi_research.adapters.formats.names import place_of
from sushi_research.adapters.matching import match_layers
from sushi_research.adapters.module_names import locate, published_layers
from sushi_research.adapters.peft_settings import BESIDE, OF_PEFT
from sushi_research.adapters.reading import Adapter, read_adapter
from sushi_research.errors import UserError
from sushi_research.models import ARCHITECTURES
from sushi_research.models.original_names import unet_name

PLAIN = {"sd15": (0,), "sdxl": ()}


def stability(architecture, path):
    return unet_name(path, plain_up_blocks=PLAIN[architecture])


def flat(name):
    return name.replace(".", "_")


def long_path(path):
    """A text encoder's path as transformers before 5.6 has it."""
    return path if path.startswith(("text_model.", "text_projection")) else f"text_model.{path}"


def te(architecture, component):
    return {"sd15": "lora_te_"}.get(architecture) or {"text_encoder": "lora_te1_"}.get(component, "lora_te2_")


# Format -> (architecture, component, path) -> the module's name; (down, up).
AB, DOWN_UP = ("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")
COMFY = {"text_encoder": "text_encoders.clip_l.transformer.", "text_encoder_2": "text_encoders.clip_g.transformer."}
FORMATS = {
    "kohya": (
        lambda a, c, p: (
            te(a, c) + flat(long_path(p)) if c != "unet" else "lora_unet_" + flat(stability(a, p) if a == "sdxl" else p)
        ),
        DOWN_UP,
    ),
    # kohya's fork for SD1.5 in Stability's names, which ComfyUI reads.
    "Stability": (lambda a, c, p: te(a, c) + flat(p) if c != "unet" else "lora_unet_" + flat(stability(a, p)), DOWN_UP),
    "OneTrainer DIFFUSERS, SimpleTuner": (lambda a, c, p: f"{c}.{p if c == 'unet' else long_path(p)}", AB),
    "peft's names, given to diffusers": (
        lambda a, c, p: f"{c}.base_model.model.{p if c == 'unet' else long_path(p)}",
        AB,
    ),
    "OneTrainer LEGACY, ai-toolkit": (
        lambda a, c, p: te(a, c) + flat(long_path(p)) if c != "unet" else "lora_unet_" + flat(p),
        DOWN_UP,
    ),
    "OneTrainer ORIGINAL": (lambda a, c, p: stability(a, p) if c == "unet" else None, AB),
    "OneTrainer COMFY": (
        lambda a, c, p: "diffusion_model." + stability(a, p) if c == "unet" else COMFY[c] + long_path(p),
        AB,
    ),
    "OneTrainer's backup": (lambda a, c, p: f"{c}.{p}", DOWN_UP),
    "LyCORIS": (lambda a, c, p: "lycoris_" + flat(p) if c == "unet" else None, DOWN_UP),
    "save_attn_procs": (lambda a, c, p: p if c == "unet" else None, ("lora.down.weight", "lora.up.weight")),
    "peft": (lambda a, c, p: f"base_model.model.{p}" if c == "unet" else None, AB),
    "peft in memory": (
        lambda a, c, p: f"base_model.model.{p}" if c == "unet" else None,
        ("lora_A.default.weight", "lora_B.default.weight"),
    ),
}
# What OneTrainer's preset "full" adapts: all linear and convolutional layers, conv_in, conv_out and the embeddings too.
FULL = {"sd15": 282, "sdxl": 794}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_layer_is_found_by_every_name(architecture, tmp_path):
    layers = published_layers(architecture)
    assert sum(len(shape) > 1 for shape in layers["unet"].values()) == FULL[architecture]
    for title, (name_of, endings) in FORMATS.items():
        wanted, entries = {}, []
        for component, own in layers.items():
            for path, shape in own.items():
                name = name_of(architecture, component, path) if len(shape) > 1 else None
                if name is None:
                    continue
                places = [place_of(f"{name}.{ending}") for ending in endings]
                assert [place.part for place in places] == ["down", "up"] and len(
                    {place.module for place in places}
                ) == 1
                matrices = torch.empty(2, *shape[1:], device="meta"), torch.empty(shape[0], 2, *[1] * (len(shape) - 2))
                entries.append(LowRank(places[0].module, *matrices))
                wanted.setdefault(component, {})[path] = entries[-1]
        found, matches = locate(Adapter(tmp_path / "a.safetensors", None, tuple(entries)))
        assert found.name == architecture, title
        assert matches == wanted, title


def save(path, tensors, metadata=None):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


def pair(rank=2, width=320):
    return torch.ones(rank, width), torch.ones(width, rank)


KEY = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k"


def test_old_processors_without_a_prefix(tmp_path):
    """diffusers' `save_attn_procs` of 2023; `to_out` is then the layer itself."""
    block = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor"
    tensors = {
        f"{block}.{layer}_lora.{way}.weight": matrix
        for layer in ("to_q", "to_k", "to_v", "to_out")
        for way, matrix in zip(("down", "up"), pair(), strict=True)
    }
    adapter = read_adapter(save(tmp_path / "pytorch_lora_weights.safetensors", tensors))
    architecture, matches = locate(adapter)
    ends = {path.rpartition("attn1.")[2] for path in matches["unet"]}
    assert architecture.name == "sd15" and ends == {"to_q", "to_k", "to_v", "to_out.0"}


def test_the_settings_beside_peft_s_own_file(tmp_path):
    down, up = pair()
    file = save(
        tmp_path / OF_PEFT,
        {f"base_model.model.{KEY}.lora_A.weight": down, f"base_model.model.{KEY}.lora_B.weight": up},
    )
    assert "neither alphas nor metadata" in read_adapter(file).notes[0]
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "use_rslora": False, "alpha_pattern": {"to_k": 5}}
    (tmp_path / BESIDE).write_text(json.dumps(settings))
    adapter = read_adapter(file)
    assert adapter.entries[0].scale == 2.5 and adapter.notes == ()
    for change, said in (
        ({"r": 4}, f"{BESIDE} beside it gives {KEY} the rank 4, but its matrices have rank 2"),
        ({"peft_type": "LOHA"}, "was saved with peft_type = 'LOHA', which cannot be used here"),
    ):
        (tmp_path / BESIDE).write_text(json.dumps(settings | change))
        with pytest.raises(UserError, match=said):
            read_adapter(file)


def test_magnitudes_of_the_outputs_have_one_axis(tmp_path):
    """peft's [out] and [1, out, 1, 1], ai-toolkit's [out], LyCORIS' [out, 1, 1, 1] and [1, in]."""
    linear, conv = f"unet.{KEY}", "unet.down_blocks.0.resnets.0.conv1"
    down, up = pair()
    convolution = {f"{conv}.lora_A.weight": torch.ones(2, 320, 3, 3), f"{conv}.lora_B.weight": torch.ones(320, 2, 1, 1)}
    matrices = {f"{linear}.lora_A.weight": down, f"{linear}.lora_B.weight": up}
    for of_linear, of_conv, shapes in (
        (
            {"lora_magnitude_vector": torch.ones(320)},
            {"lora_magnitude_vector.weight": torch.ones(1, 320, 1, 1)},
            [(320, 1), (320, 1, 1, 1)],
        ),
        ({"magnitude": torch.ones(320)}, {"dora_scale": torch.ones(320, 1, 1, 1)}, [(320, 1), (320, 1, 1, 1)]),
        ({"dora_scale": torch.ones(1, 320)}, {"dora_scale": torch.ones(1, 320, 1, 1)}, [(1, 320), (1, 320, 1, 1)]),
    ):
        tensors = {f"{linear}.{part}": value for part, value in of_linear.items()}
        tensors |= {f"{conv}.{part}": value for part, value in of_conv.items()}
        _, matches = locate(read_adapter(save(tmp_path / "a.safetensors", tensors | matrices | convolution)))
        found = {path: tuple(entry.magnitude.shape) for path, entry in matches["unet"].items()}
        assert [found[KEY], found["down_blocks.0.resnets.0.conv1"]] == shapes


def test_files_that_are_located_nowhere_or_twice(tmp_path):
    down, up = pair()
    shared = "lora_unet_conv_in"
    both = {f"{shared}.lora_down.weight": torch.ones(2, 4, 3, 3), f"{shared}.lora_up.weight": torch.ones(320, 2, 1, 1)}
    neither = {f"lora_unet_{flat(KEY)}.lora_{way}.weight": each for way, each in (("down", down[:, :9]), ("up", up))}
    for tensors, said in (
        (both, "fits SD1.5 and SDXL alike, because it has only layers that they share"),
        (
            neither,
            r"fits neither SD1.5 nor SDXL \(as SD1.5: the matrices of .*; as SDXL: 1 of 1 modules not found.*--base",
        ),
    ):
        with pytest.raises(UserError, match=said) as caught:
            locate(read_adapter(save(tmp_path / "a.safetensors", tensors)))
        assert str(caught.value).endswith(".") and "\n" not in str(caught.value)
    twice = {
        f"{name}.lora_{way}.weight": each.clone()
        for name in (f"lora_unet_{flat(KEY)}", f"lycoris_{flat(KEY)}")
        for way, each in (("down", down), ("up", up))
    }
    with pytest.raises(UserError, match=r"which are the same module of the base; as SDXL: "):
        locate(read_adapter(save(tmp_path / "a.safetensors", twice)))


def test_an_absurd_product_is_refused_by_its_shapes(tmp_path):
    """Two matrices of 4 MB each stand for a change of 64 GB: nothing is computed."""
    name = f"lora_unet_{flat(KEY)}"
    shapes = {"lokr_w1": (1024, 1024), "lokr_w2": (1024, 1024)}
    adapter = Adapter(
        tmp_path / "a", None, (read_adapter(_zeros(tmp_path / "a.safetensors", name, shapes)).entries[0],)
    )
    layers = {"unet": {}}
    with pytest.raises(UserError, match=r"1 of 1 modules not found"):
        match_layers(adapter, ARCHITECTURES["sd15"], layers, 2)
    with pytest.raises(
        UserError, match=r"are \[1024, 1024\], \[1024, 1024\], and the weight that they change is \[320, 320\]"
    ):
        locate(adapter)


def test_a_tensor_beyond_any_layer_is_refused_by_the_header(tmp_path):
    """The file has a hole of 8 GB where the values are."""
    name = f"lora_unet_{flat(KEY)}"
    tensors = {f"{name}.lora_down.weight": hole(2**27, 32), f"{name}.lora_up.weight": hole(32, 2**27)}
    with pytest.raises(
        UserError, match=r"lora_down.weight of the shape \[134217728, 32\], more numbers than an adapter of any"
    ):
        read_adapter(lay_out(tmp_path / "a.safetensors", tensors))


def _zeros(path, name, shapes):
    return save(path, {f"{name}.{part}": torch.zeros(shape) for part, shape in shapes.items()})
