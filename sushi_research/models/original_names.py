"""Maps parameter names of the diffusers and transformers models to names in Stability's original checkpoint layout.

All names are relative to the component's prefix in the file: `model.diffusion_model.` for the UNet, `first_stage_model.` for
the VAE, `cond_stage_model.transformer.` for the text encoder of SD1.5, `conditioner.embedders.0.transformer.` and
`conditioner.embedders.1.model.` for the two of SDXL. The maps are one to one, except for OpenCLIP's `in_proj`, which three
parameters share. An unknown path raises KeyError.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

_UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_PLACE = re.compile(
    r"(?:(down|up)_blocks\.(\d+)|(mid)_block)\.(attentions|resnets|downsamplers|upsamplers)\.(\d+)\.(.+)"
)
# The names inside an attention block are the same in both layouts.
_UNET_ATTENTION = re.compile(
    r"norm|proj_in|proj_out"
    r"|transformer_blocks\.\d+\.(norm[123]|attn[12]\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2))"
)

_VAE_ENDS = {
    "quant_conv": "quant_conv",
    "post_quant_conv": "post_quant_conv",
    "encoder.conv_in": "encoder.conv_in",
    "encoder.conv_norm_out": "encoder.norm_out",
    "encoder.conv_out": "encoder.conv_out",
    "decoder.conv_in": "decoder.conv_in",
    "decoder.conv_norm_out": "decoder.norm_out",
    "decoder.conv_out": "decoder.conv_out",
}
_VAE_RESNET = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "conv_shortcut": "nin_shortcut"}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_VAE_LEVEL = re.compile(
    r"(?:encoder\.(?=down)|decoder\.(?=up))(down|up)_blocks\.(\d+)\.(?:resnets\.(\d+)\.(.+)|\1samplers\.0\.conv)"
)
_VAE_MIDDLE = re.compile(r"(encoder|decoder)\.mid_block\.(?:resnets\.([01])|attentions\.0)\.(.+)")

_CLIP_LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.+)")
# transformers' names inside a layer -> OpenCLIP's; q, k and v are thirds of `attn.in_proj`.
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_THIRDS = {"self_attn.q_proj": 0, "self_attn.k_proj": 1, "self_attn.v_proj": 2}
_OPEN_CLIP_ENDS = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}


@dataclass(frozen=True)
class Place:
    """The tensor that holds a parameter in the original layout; `name` is relative to the component's prefix."""

    name: str
    # 0, 1 or 2 if the parameter is one third of the tensor's rows.
    third: int | None = None
    # Whether the tensor is [in, out] and the parameter [out, in].
    transposed: bool = False


def unet_name(path: str, *, layers_per_block: int = 2, plain_up_blocks: Collection[int] = ()) -> str:
    """diffusers' path of a UNet parameter, or of a module with parameters -> Stability's.

    Stability numbers its blocks by layers, so the map depends on `layers_per_block`. `plain_up_blocks` are the indices of the
    up blocks without attention (the first one in SD1.5); the index of their upsampler is lower by one.
    """
    module, end = _split(path)
    if module in _UNET_ENDS:
        return _UNET_ENDS[module] + end
    match = _UNET_PLACE.fullmatch(module)
    if match is None:
        raise KeyError(path)
    part, block, kind, index, inner = match[1] or match[3], int(match[2] or 0), match[4], int(match[5]), match[6]
    stride = layers_per_block + 1
    if kind.endswith("samplers"):
        if (kind, index, inner) == ("downsamplers", 0, "conv") and part == "down":
            return f"input_blocks.{stride * (block + 1)}.0.op{end}"
        if (kind, index, inner) == ("upsamplers", 0, "conv") and part == "up":
            place = 1 if block in plain_up_blocks else 2
            return f"output_blocks.{stride * block + layers_per_block}.{place}.conv{end}"
        raise KeyError(path)

    attention = kind == "attentions"
    known = _UNET_ATTENTION.fullmatch(inner) if attention else inner in _UNET_RESNET
    count = {"down": layers_per_block, "mid": 1 if attention else 2, "up": layers_per_block + 1}[part]
    if not known or index >= count:
        raise KeyError(path)
    inner = inner if attention else _UNET_RESNET[inner]
    if part == "mid":
        return f"middle_block.{1 if attention else 2 * index}.{inner}{end}"
    number = stride * block + index
    place = f"input_blocks.{number + 1}" if part == "down" else f"output_blocks.{number}"
    return f"{place}.{int(attention)}.{inner}{end}"


def vae_name(path: str, *, levels: int) -> str:
    """AutoencoderKL's path of a parameter -> Stability's. `levels` is the length of `block_out_channels`.

    Stability numbers the decoder's levels in reverse order. Its q, k, v and proj_out of the middle attention are 1x1
    convolutions with weights of shape [C, C, 1, 1].
    """
    module, end = _split(path)
    if module in _VAE_ENDS:
        return _VAE_ENDS[module] + end
    if match := _VAE_MIDDLE.fullmatch(module):
        half, resnet, inner = match.groups()
        place, names = ("attn_1", _VAE_ATTENTION) if resnet is None else (f"block_{int(resnet) + 1}", _VAE_RESNET)
        if inner in names:
            return f"{half}.mid.{place}.{names[inner]}{end}"
    elif (match := _VAE_LEVEL.fullmatch(module)) and int(match[2]) < levels:
        way, level, resnet, inner = match[1], int(match[2]), match[3], match[4]
        place = f"encoder.down.{level}" if way == "down" else f"decoder.up.{levels - 1 - level}"
        if resnet is None:
            return f"{place}.{way}sample.conv{end}"
        if inner in _VAE_RESNET:
            return f"{place}.block.{resnet}.{_VAE_RESNET[inner]}{end}"
    raise KeyError(path)


def clip_name(path: str) -> str:
    """CLIPTextModel's path of a parameter, with or without `text_model.` -> the name in the file, always with `text_model.`."""
    inner = path.removeprefix("text_model.")
    module, end = _split(inner)
    layer = _CLIP_LAYER.fullmatch(module)
    known = end and (layer[2] in _OPEN_CLIP_LAYER or layer[2] in _THIRDS) if layer else inner in _OPEN_CLIP_ENDS
    if not known:
        raise KeyError(path)
    return f"text_model.{inner}"


def open_clip_place(path: str) -> Place:
    """CLIPTextModelWithProjection's path of a parameter, with or without `text_model.` -> its place in OpenCLIP's layout."""
    if path == "text_projection.weight":
        return Place("text_projection", transposed=True)
    inner = path.removeprefix("text_model.")
    if inner in _OPEN_CLIP_ENDS:
        return Place(_OPEN_CLIP_ENDS[inner])
    module, end = _split(inner)
    if end and (layer := _CLIP_LAYER.fullmatch(module)):
        place = f"transformer.resblocks.{layer[1]}"
        if layer[2] in _THIRDS:
            return Place(f"{place}.attn.in_proj_{end[1:]}", third=_THIRDS[layer[2]])
        if layer[2] in _OPEN_CLIP_LAYER:
            return Place(f"{place}.{_OPEN_CLIP_LAYER[layer[2]]}{end}")
    raise KeyError(path)


def _split(path: str) -> tuple[str, str]:
    """("conv_in", ".weight") for "conv_in.weight", ("conv_in", "") for "conv_in"."""
    module, dot, last = path.rpartition(".")
    return (module, dot + last) if last in ("weight", "bias") else (path, "")
