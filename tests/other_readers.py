"""What ComfyUI, Forge, A1111 and InvokeAI make of an adapter file: a second reader, written from these programs' rules alone.

It imports nothing of sushi_research, so that a fault in our names or formulas cannot hide in both. The rules were read in the
programs' sources (2026-11: ComfyUI 0.3.64, Forge 2.0.1, A1111 1.10, InvokeAI 6.14) and are written anew:

    program    name of a module                                                  what happens to a key that fits none
    ComfyUI    a table of every name that a layer can have                       a warning in the log
    Forge      ComfyUI's older table                                             ignored, above 12 the file is refused
    A1111      up to the first dot; diffusers' blocks are rewritten              ignored; a module of unknown kind ends it
    InvokeAI   up to the first dot; SDXL in Stability's or in diffusers' blocks  ignored; SDXL with another prefix ends it

All use alpha / rank as the scale, and 1 without an alpha. Sums are made in float64.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

Tensor = torch.Tensor
# (component: unet, text_encoder or text_encoder_2; path of the layer in it as diffusers has it, without `text_model.`)
Layer = tuple[str, str]
PROGRAMS = ("ComfyUI", "Forge", "A1111", "InvokeAI")
# Of a CLIP layer, the parts that trainers adapt.
CLIP_PARTS = tuple(f"self_attn.{name}_proj" for name in "qkv") + ("self_attn.out_proj", "mlp.fc1", "mlp.fc2")


@dataclass
class Loaded:
    """What a program does to a model at the strength 1: the changes of weights and biases, the keys that it does not use, and why
    it refuses the file as a whole ("" if it does not)."""

    weights: dict[Layer, Tensor] = field(default_factory=dict)
    biases: dict[Layer, Tensor] = field(default_factory=dict)
    unused: set[str] = field(default_factory=set)
    refused: str = ""


def load(program: str, architecture: str, tensors: Mapping[str, Tensor], weights: Mapping[Layer, Tensor]) -> Loaded:
    """What `program` makes of the tensors of a file on a model of these weights. `architecture` is sd15 or sdxl."""
    if program == "InvokeAI":
        return _invoke(architecture, tensors, weights)
    if program == "A1111":
        return _a1111(architecture, tensors, weights)
    assert program in ("ComfyUI", "Forge"), program
    return _comfy(architecture, tensors, weights, forge=program == "Forge")


def stability_names(paths: Iterable[str]) -> dict[str, str]:
    """diffusers' path of every UNet layer -> Stability's, found by counting the blocks in the order in which they are built."""
    paths = list(paths)
    blocks = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    for number in (1, 2):
        blocks[f"time_embedding.linear_{number}"] = f"time_embed.{2 * number - 2}"
        blocks[f"add_embedding.linear_{number}"] = f"label_emb.0.{2 * number - 2}"
    blocks |= {f"mid_block.resnets.{number}": f"middle_block.{2 * number}" for number in (0, 1)}
    blocks["mid_block.attentions.0"] = "middle_block.1"
    for side, name in (("down", "input_blocks"), ("up", "output_blocks")):
        place = 1 if side == "down" else 0  # the first input block is conv_in
        for level in range(4):
            inner = [path for path in paths if path.startswith(f"{side}_blocks.{level}.")]
            layers = {path.split(".")[3] for path in inner if ".resnets." in path}
            for layer in sorted(layers):
                block, attention = f"{side}_blocks.{level}", any(f".attentions.{layer}." in path for path in inner)
                blocks[f"{block}.resnets.{layer}"] = f"{name}.{place}.0"
                blocks[f"{block}.attentions.{layer}"] = f"{name}.{place}.1"
                if layer == max(layers):  # an upsampler stands in the block of the last layer, after its attention
                    blocks[f"{block}.upsamplers.0.conv"] = f"{name}.{place}.{2 if attention else 1}.conv"
                place += 1
            if side == "down" and any(".downsamplers." in path for path in inner):
                blocks[f"{side}_blocks.{level}.downsamplers.0.conv"] = f"{name}.{place}.0.op"
                place += 1
    parts = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0"}
    parts |= {"conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
    names = {}
    for path in paths:
        block = next(block for block in blocks if path == block or path.startswith(f"{block}."))
        part = path[len(block) + 1 :]
        part = parts[part] if ".resnets." in path else part
        names[path] = blocks[block] + (f".{part}" if part else "")
    return names


# --- ComfyUI and Forge ---


def _comfy(architecture: str, tensors: Mapping[str, Tensor], weights: Mapping[Layer, Tensor], *, forge: bool) -> Loaded:
    found, used = Loaded(), set[str]()
    for name, layer in _comfy_names(architecture, weights, forge=forge).items():
        own: dict[str, Tensor] = {}
        for ending, part in _COMFY_ENDINGS.items():
            if (key := name + ending) in tensors:
                own[part], used = tensors[key], used | {key}
        if own:
            _apply(found, layer, own, weights[layer], "ComfyUI")
    if forge and any(key.endswith(".lokr_t2") for key in used):
        return Loaded(unused=set(tensors), refused="torch.kron fails with a core")
    found.unused = set(tensors) - used
    if forge and len(found.unused) > 12:
        found = Loaded(unused=set(tensors), refused=f"{len(found.unused)} keys are left over")
    return found


_LYCORIS = ("alpha", "dora_scale", "diff", "diff_b", "w_norm", "b_norm", "hada_t1", "hada_t2", "lokr_t2")
_LYCORIS += tuple(f"{kind}_w{number}_{side}" for kind in ("hada", "lokr") for number in "12" for side in "ab")
_LYCORIS += ("lokr_w1", "lokr_w2")
_COMFY_ENDINGS = {f".{part}": part for part in _LYCORIS} | {".lora_mid.weight": "mid"}
for _up, _down in (
    (".lora_up", ".lora_down"),
    (".lora_B", ".lora_A"),
    (".lora.up", ".lora.down"),
    ("_lora.up", "_lora.down"),
    (".lora_linear_layer.up", ".lora_linear_layer.down"),
):
    _COMFY_ENDINGS |= {f"{_up}.weight": "up", f"{_down}.weight": "down"}


def _comfy_names(architecture: str, layers: Iterable[Layer], *, forge: bool) -> dict[str, Layer]:
    names: dict[str, Layer] = {}
    stability = stability_names(path for component, path in layers if component == "unet")
    for layer in layers:
        component, path = layer
        if component == "unet":
            flat, old = (
                path.replace(".", "_"),
                re.sub(r"\.to_out\.0$", ".to_out", path).replace(".to_", ".processor.to_"),
            )
            own = [f"lora_unet_{flat}", f"lycoris_{flat}", old, f"unet.{old}", f"diffusion_model.{stability[path]}"]
            own.append("lora_unet_" + stability[path].replace(".", "_"))
        else:
            number = 1 if component == "text_encoder" else 2
            flat = "text_model_" + path.replace(".", "_")
            own = [] if forge else [f"text_encoders.clip_{'lg'[number - 1]}.transformer.text_model.{path}"]
            if re.sub(r"encoder\.layers\.\d+\.", "", path) in CLIP_PARTS:
                own += [f"lora_te{number}_{flat}", f"{component}.text_model.{path}"]
                own += [f"lora_te_{flat}"] if number == 1 else []
            if path == "text_projection" and number == 2:
                own.append("lora_te2_text_projection")
        names |= dict.fromkeys(own, layer)
    return names


# --- A1111 ---

_A1111_BLOCK = re.compile(r"lora_unet_(?:(down|up)_blocks_(\d+)|mid_block)_(attentions|resnets)_(\d+)_(.+)")
_A1111_PARTS = {"norm1": "in_layers_0", "conv1": "in_layers_2", "time_emb_proj": "emb_layers_1"}
_A1111_PARTS |= {"norm2": "out_layers_0", "conv2": "out_layers_3", "conv_shortcut": "skip_connection"}


def _a1111_name(name: str) -> str:
    """A module's name in a file -> its name in Stability's model, as A1111 computes it."""
    if match := _A1111_BLOCK.fullmatch(name):
        side, level, kind, number, part = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
        part = _A1111_PARTS.get(part, part) if kind == "resnets" else part
        inner = 1 if kind == "attentions" else 0
        if side is None:
            return f"unet_middle_block_{1 if inner else 2 * number}_{part}"
        return f"unet_{'input' if side == 'down' else 'output'}_blocks_{3 * level + number + (side == 'down')}_{inner}_{part}"
    if match := re.fullmatch(r"lora_unet_down_blocks_(\d+)_downsamplers_0_conv", name):
        return f"unet_input_blocks_{3 * int(match[1]) + 3}_0_op"
    if match := re.fullmatch(r"lora_unet_up_blocks_(\d+)_upsamplers_0_conv", name):
        # It takes the first up block for one without attention, which is wrong for SDXL.
        return f"unet_output_blocks_{3 * int(match[1]) + 2}_{1 if int(match[1]) == 0 else 2}_conv"
    if match := re.fullmatch(r"lora_unet_time_embedding_linear_(\d+)", name):
        return f"unet_time_embed_{2 * int(match[1]) - 2}"
    ends = {"lora_unet_conv_in": "unet_input_blocks_0_0", "lora_unet_conv_out": "unet_out_2"}
    return ends.get(name, name.removeprefix("lora_"))


def _a1111(architecture: str, tensors: Mapping[str, Tensor], weights: Mapping[Layer, Tensor]) -> Loaded:
    stability = stability_names(path for component, path in weights if component == "unet")
    layers: dict[str, Layer] = {}
    for component, path in weights:
        if component == "unet":
            layers["unet_" + stability[path].replace(".", "_")] = component, path
        elif re.sub(r"encoder\.layers\.\d+\.", "", path) in CLIP_PARTS or component == "text_encoder":
            flat = f"text_model_{path.replace('.', '_')}"
            prefixes = (
                ("te2_",) if component == "text_encoder_2" else ("te1_",) if architecture == "sdxl" else ("te_", "te1_")
            )
            layers |= {prefix + flat: (component, path) for prefix in prefixes}
    modules: dict[Layer, dict[str, Tensor]] = {}
    found = Loaded()
    for key, tensor in tensors.items():
        name, _, part = key.partition(".")
        layer = layers.get(_a1111_name(name))
        if layer is None:
            found.unused.add(key)
        else:
            modules.setdefault(layer, {})[_PARTS.get(part, part)] = tensor
    # OpenCLIP has one module for q, k and v: it changes only if all four projections of an attention are in the file.
    lone = {
        (component, path)
        for component, path in modules
        if component == "text_encoder_2" and re.search(r"self_attn\.[qkv]_proj$", path)
        if not {(component, re.sub(r"\w+_proj$", f"{part}_proj", path)) for part in ("q", "k", "v", "out")}
        <= modules.keys()
    }
    for layer, own in modules.items():
        kinds = ({"up", "down"}, {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}, {"diff"}, {"w_norm", "b_norm"})
        whole = any(kind <= own.keys() for kind in kinds) or any(
            {f"lokr_w1{one}", f"lokr_w1{two}", f"lokr_w2{three}", f"lokr_w2{four}"} <= own.keys()
            for one, two in (("", ""), ("_a", "_b"))
            for three, four in (("", ""), ("_a", "_b"))
        )
        if not whole:
            return Loaded(unused=set(tensors), refused=f"no kind of module has the keys {sorted(own)}")
        if layer not in lone:
            _apply(found, layer, own, weights[layer], "A1111")
    return found


# --- InvokeAI ---

_PARTS = {"lora_up.weight": "up", "lora_down.weight": "down", "lora_mid.weight": "mid"}


def _invoke(architecture: str, tensors: Mapping[str, Tensor], weights: Mapping[Layer, Tensor]) -> Loaded:
    stability = stability_names(path for component, path in weights if component == "unet")
    prefixes = {
        "sd15": {"text_encoder": "lora_te_"},
        "sdxl": {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"},
    }
    layers: dict[str, Layer] = {}
    original: dict[str, Layer] = {}
    for layer in weights:
        component, path = layer
        flat = path.replace(".", "_")
        if component == "unet":
            layers[f"lora_unet_{flat}"] = layer
            original["lora_unet_" + stability[path].replace(".", "_")] = layer
        else:
            flat = flat if path == "text_projection" else f"text_model_{flat}"
            layers[prefixes[architecture][component] + flat] = layer
    if any("." not in key for key in tensors):
        return Loaded(unused=set(tensors), refused="a key has no dot")
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, part = key.split(".", 1)
        modules.setdefault(name, {})[_PARTS.get(part, part)] = tensor
    if architecture == "sdxl":
        strange = [name for name in modules if not name.startswith(("lora_unet_", "lora_te1_", "lora_te2_"))]
        names = {name for name in modules if name.startswith("lora_unet_")}
        if strange or (names & original.keys() and names - original.keys()):
            return Loaded(unused=set(tensors), refused=f"it cannot convert {min(strange or names - original.keys())}")
        layers |= original
    found = Loaded()
    for name, own in modules.items():
        layer = layers.get(name)
        heads = ("up", "hada_w1_a", "lokr_w1", "lokr_w1_a", "diff", "w_norm")
        if not any(head in own for head in heads) or ("dora_scale" in own and "up" not in own):
            return Loaded(unused=set(tensors), refused=f"it knows no kind with the keys {sorted(own)}")
        if layer is None:
            found.unused |= {key for key in tensors if key.startswith(f"{name}.")}
        else:
            _apply(found, layer, own, weights[layer], "InvokeAI")
    return found


# --- what a layer's tensors say ---


def _apply(found: Loaded, layer: Layer, own: Mapping[str, Tensor], weight: Tensor, program: str) -> None:
    """Adds the change that the parts of a module make."""
    own = {part: tensor.double() for part, tensor in own.items()}
    bias = own.get("diff_b", own.get("b_norm"))
    if bias is not None:
        found.biases[layer] = bias
    change = own.get("diff", own.get("w_norm"))
    rank = None
    if "up" in own:
        rank, change = own["down"].shape[0], _low_rank(own["up"], own["down"], own.get("mid"))
    elif "hada_w1_a" in own:
        rank = own["hada_w1_b"].shape[0]
        change = _pair(own, "hada_w1", "hada_t1") * _pair(own, "hada_w2", "hada_t2")
    elif {"lokr_w1", "lokr_w1_a", "lokr_w2", "lokr_w2_a"} & own.keys():
        ranks = [own[part].shape[0] for part in ("lokr_w2_b", "lokr_w1_b") if part in own]
        rank = (ranks[-1] if program == "InvokeAI" else ranks[0]) if ranks else None
        # ComfyUI does not get past torch.kron with a core: it logs an error, and the layer stays as it is.
        if program != "ComfyUI" or "lokr_t2" not in own:
            change = _kronecker(_pair(own, "lokr_w1", ""), _pair(own, "lokr_w2", "lokr_t2"))
    if change is None:
        return
    change = change.reshape(weight.shape)
    if rank is not None and "alpha" in own:
        change = change * (own["alpha"].item() / rank)
    if "dora_scale" in own:
        change = _decomposed(weight.double(), change, own["dora_scale"], program)
    found.weights[layer] = change


def _low_rank(up: Tensor, down: Tensor, mid: Tensor | None) -> Tensor:
    up = up.flatten(1)
    return up @ down.flatten(1) if mid is None else torch.einsum("abkl,oa,bi->oikl", mid, up, down.flatten(1))


def _pair(own: Mapping[str, Tensor], name: str, core: str) -> Tensor:
    """The matrix `name`, or the product of its two factors, by way of a core of a convolution if there is one."""
    if name in own:
        return own[name]
    first, second = own[f"{name}_a"], own[f"{name}_b"]
    return torch.einsum("abkl,ao,bi->oikl", own[core], first, second) if core in own else first @ second.flatten(1)


def _kronecker(first: Tensor, second: Tensor) -> Tensor:
    """Every entry of `first` [a, b] times `second` [c, d, ...], as one matrix [a * c, b * d, ...]."""
    blocks = torch.einsum("ab,cd...->acbd...", first, second)
    return blocks.reshape(first.shape[0] * second.shape[0], first.shape[1] * second.shape[1], *second.shape[2:])


def _decomposed(weight: Tensor, change: Tensor, magnitude: Tensor, program: str) -> Tensor:
    """The change with the direction of `weight + change` and this magnitude.

    ComfyUI and Forge divide by the norms of the unchanged weight if the magnitude has one number for each output.
    """
    changed = weight + change
    flat = changed.transpose(0, 1).flatten(1)
    norms = flat.norm(dim=1).reshape(1, -1, *[1] * (weight.dim() - 2))
    if program == "ComfyUI" and magnitude.shape[0] == weight.shape[0]:
        norms = weight.flatten(1).norm(dim=1).reshape(-1, *[1] * (weight.dim() - 1))
    return changed * (magnitude / norms) - weight


def invoke_base(tensors: Mapping[str, Tensor]) -> str | None:
    """What InvokeAI takes a file of kohya's names and of the published shapes for; None if it cannot tell the base."""
    numbers: dict[str, int | None] = {}
    for key in sorted(tensors):
        name, _, part = key.partition(".")
        size = None
        if part in ("lora_down.weight", "hada_w1_b", "hada_w2_b", "diff"):
            size = tensors[key].shape[1]
        elif part.startswith("lokr_") and {f"{name}.lokr_w1", f"{name}.lokr_w2"} <= tensors.keys():
            size = tensors[f"{name}.lokr_w1"].shape[1] * tensors[f"{name}.lokr_w2"].shape[1]
        found = None
        if name.startswith("lora_unet_") and name.endswith(("_attn2_to_k", "_attn2_to_v")):
            found = size
        elif name.startswith("lora_unet_") and "time_emb_proj.lora_down" in key:
            found = size
        elif (text := re.match(r"lora_te[12]?_", name)) and "_self_attn_" in key:
            numbers[text[0]] = size  # the last key counts, which is often one without a size
            found = size if text[0] == "lora_te_" else None
        if numbers.get("lora_te1_") and numbers.get("lora_te2_"):
            found = numbers["lora_te1_"] + numbers["lora_te2_"]
        if found is not None:
            return {768: "sd15", 1024: "sd20", 1280: "sdxl", 2048: "sdxl"}.get(found)
    place = r"lora_unet_(?:(?:down_blocks|up_blocks)_\d+_attentions_\d+|mid_block_attentions_\d+|(?:in|out)put_blocks_\d+_\d+"
    deep = re.compile(place + r"|middle_block_\d+)_transformer_blocks_(\d+)_")
    return "sdxl" if any((match := deep.match(key)) and int(match[1]) >= 2 for key in tensors) else None
