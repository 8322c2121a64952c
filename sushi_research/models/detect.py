"""Detects a base's architecture: from the names and shapes in a single file's header, or from a diffusers folder's configs.

The detection rules of each architecture, and of related models that resemble it, are in its module in `models/formats/`. This
module recognises other kinds of files. Every unsupported model is refused by its name, with advice. The decision uses the UNet
and its conditioning, never a trial load or the file size. Two things are no evidence: the mere presence of a config key (every
UNet config has `addition_embed_type`), and a second text encoder (the SDXL refiner has one too).
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from sushi_research.errors import UserError
from sushi_research.models import ARCHITECTURES, labels
from sushi_research.models.formats import FileUNet, Match, number
from sushi_research.models.header import Header

CHOOSE = f"choose an {labels()} base"


class Kind(NamedTuple):
    """An unsupported kind of file: a pattern that one of its tensor names matches, its name, and advice to the user."""

    pattern: str
    name: str
    advice: str


NOT_TRAINED = f"this suite trains the UNets of {labels(' and ')}: {CHOOSE}"
VIDEO = "a video model (Stable Video Diffusion or AnimateDiff)"
LCM = "a latent consistency model (its UNet takes the guidance scale as an input)"
# The first match counts. Patterns match from the start of a tensor name, after the UNet prefix is removed.
KINDS = (
    Kind(
        r"lora_(unet|te\d?)_|lycoris_|(.*\.)?(\w+_)?(lora_(down|up|A|B)\b|lora\.(down|up)\b|lora_linear_layer|hada_w1|lokr_w|oft_)",
        "a LoRA (adapter) file",
        "name the base that it was trained on as the base, and give this file to scripts/sample.py --adapters",
    ),
    Kind(r"control_model\.|input_hint_block\.|controlnet_cond_embedding\.|lllite_", "a ControlNet", NOT_TRAINED),
    Kind(r"adapter\.body\.|body\.\d+\.in_conv", "a T2I-Adapter", NOT_TRAINED),
    Kind(r"ip_adapter\.|image_proj\.", "an IP-Adapter", NOT_TRAINED),
    Kind(r"(emb_params|string_to_param|clip_[lg])$", "a textual inversion embedding", NOT_TRAINED),
    Kind(r"(double_stream_modulation_img|single_stream_modulation)\.", "FLUX.2", NOT_TRAINED),
    Kind(r"distilled_guidance_layer\.", "Chroma", NOT_TRAINED),
    Kind(r"double_blocks\.\d+\.img_(attn|mod\.lin)\.|single_transformer_blocks\.", "FLUX.1", NOT_TRAINED),
    Kind(r"joint_blocks\.(0\.x_block\.attn2|37)\.", "Stable Diffusion 3.5", NOT_TRAINED),
    Kind(
        r"joint_blocks\.|transformer_blocks\.\d+\.norm1_context\.",
        "Stable Diffusion 3 (a transformer, not a UNet)",
        NOT_TRAINED,
    ),
    Kind(
        r".*\.(time_stack|time_mixer|temporal_transformer_block|motion_modules)\b",
        VIDEO,
        NOT_TRAINED,
    ),
    Kind(r"edm_mean$", "Playground v2.5 (its noise levels and latents are not SDXL's)", NOT_TRAINED),
    Kind(
        r"edm_vpred\.sigma_max$",
        "a CosXL model (v-prediction on EDM's continuous noise levels, not on SDXL's schedule)",
        NOT_TRAINED,
    ),
    Kind(r"scaled_fp8$", "a quantised (fp8) checkpoint", "take the model's fp16 file"),
    Kind(r"time_embed(ding)?\.cond_proj\.", LCM, NOT_TRAINED),
    Kind(r"conditioner\.embedders\.0\.model\.", "the SDXL refiner", "train the SDXL base model instead"),
)
UNET_PREFIX = re.compile(r"^(model\.)?diffusion_model\.")
FIRST = "input_blocks.0.0.weight"


def of_file(header: Header) -> str:
    """The architecture of a base in a single file; UserError, with the kind of file and advice, if it is not supported."""
    shapes = {UNET_PREFIX.sub("", key): tensor.shape for key, tensor in header.tensors.items()}
    for kind in KINDS:
        pattern = re.compile(kind.pattern)
        if any(pattern.match(key) for key in shapes):
            raise UserError(f"{header.path} is {kind.name}; {kind.advice}.")
    if len(shapes.get(FIRST, ())) != 4:
        raise UserError(f"{header.path} is {_without_unet(shapes)}.")
    refusal = _by_inputs(shapes[FIRST][1])
    keys = [key for key in shapes if key.endswith("attn2.to_k.weight")]
    if not refusal and not keys:
        refusal = "a UNet without text (no cross-attention)"
    if refusal:
        raise UserError(f"{header.path} is {refusal}; {NOT_TRAINED}.")
    added = shapes.get("label_emb.0.0.weight")
    unet = FileUNet(
        context=shapes[keys[0]][-1] if shapes[keys[0]] else 0,
        linear=any(len(shape) == 2 for key, shape in shapes.items() if key.endswith(".proj_in.weight")),
        added=None if added is None else added[-1] if added else 0,
        open_clip=any(key.startswith("cond_stage_model.model.") for key in shapes),
    )
    matches = {name: each.formats().of_file(unet) for name, each in ARCHITECTURES.items()}
    return _chosen(matches, str(header.path), "of an unknown architecture")


def _chosen(matches: Mapping[str, Match], where: str, unknown: str) -> str:
    """The architecture whose rule accepts the base; UserError if there is none, with the related model's name if one matches."""
    for name, match in matches.items():
        if match is True:
            return name
    relative = next((match for match in matches.values() if match), unknown)
    raise UserError(f"{where} is {relative}; {NOT_TRAINED}.")


def component_alone(names: Collection[str]) -> str | None:
    """Which component without a base a file's tensor names belong to; None if they show none."""
    if "conv_in.weight" in names and any(name.startswith("down_blocks.0.resnets.") for name in names):
        return "a UNet alone"
    if any(
        re.match(r"(first_stage_model\.)?(en|de)coder\.(conv_in|(down|mid|up)(_blocks?)?)\.", name) for name in names
    ):
        return "a VAE alone"
    if any(re.match(r"(text_model\.)?encoder\.layers\.0\.|.*resblocks\.0\.attn\.", name) for name in names):
        return "a text encoder alone"
    return None


# What follows the name of such a component in a refusal.
ALONE = {
    "a UNet alone": (
        ", with diffusers' tensor names: put it into the unet folder of a model in diffusers format and give "
        "that folder as the base"
    ),
    "a VAE alone": ": give it to model.vae, and a base to model.base",
    "a text encoder alone": f": {CHOOSE}",
}


def _without_unet(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The kind of a file without a UNet in Stability's layout, with advice."""
    if alone := component_alone(shapes):
        return alone + ALONE[alone]
    if not shapes:
        return "empty (no tensors): download it again"
    first = min(shapes)
    shown = first if first.isprintable() else "with unreadable names"
    return f"of an unknown kind (its tensors: {shown} and {len(shapes) - 1} more): {CHOOSE}"


def _by_inputs(channels: int) -> str | None:
    if channels == 9:
        return "an inpainting model (9 input channels)"
    if channels == 8:
        return "an instruct-pix2pix model (8 input channels)"
    return None if channels == 4 else f"a model whose UNet takes {channels} input channels, not 4"


def of_configs(configs: Mapping[str, Mapping[str, Any] | None], pipeline: str, where: str) -> str:
    """The architecture of a base in diffusers format, from its components' configs; UserError if it is not supported.

    `pipeline` is the `_class_name` in model_index.json. The config of a missing component is None.
    """
    unet = configs.get("unet")
    if unet is None:
        raise UserError(f"{where} holds a {pipeline} without a UNet; {NOT_TRAINED}.")
    linear = unet.get("use_linear_projection")
    if linear not in (None, True, False):  # any text would count as true
        raise UserError(
            f"the UNet's config in {where} has use_linear_projection {json.dumps(linear)}, but this suite takes only true or "
            "false: correct the file."
        )
    refusal = VIDEO if "Video" in pipeline or "AnimateDiff" in pipeline else _by_inputs(number(unet, "in_channels", 4))
    if not refusal and ("ControlNet" in pipeline or "Inpaint" in pipeline):
        refusal = f"made for {pipeline}"
    if not refusal and unet.get("time_cond_proj_dim") is not None:
        refusal = LCM
    if refusal:
        raise UserError(f"{where} is {refusal}; {NOT_TRAINED}.")
    matches = {name: each.formats().of_configs(unet, configs) for name, each in ARCHITECTURES.items()}
    conditioning = unet.get("addition_embed_type") or unet.get("class_embed_type")
    return _chosen(matches, where, f"a {pipeline} whose UNet has another conditioning ({conditioning})")


def require_fit(architecture: str, configs: Mapping[str, Mapping[str, Any]], where: str) -> None:
    """UserError unless the UNet's input widths match the text encoders' outputs.

    The hidden states' widths add up to the cross-attention width. For SDXL, the pooled output of the last encoder and the six
    embedded time_ids add up to the width of the added embedding.
    """
    each = ARCHITECTURES[architecture]
    unet, encoders = configs["unet"], [configs[name] for name in each.formats().TEXT_ENCODERS]
    width = sum(number(config, "hidden_size", 512) for config in encoders)
    wanted = number(unet, "cross_attention_dim", 1280)
    fits = width == wanted
    if unet.get("addition_embed_type") == "text_time":
        pooled, sizes = number(encoders[-1], "projection_dim", 512), 6 * number(unet, "addition_time_embed_dim", 256)
        fits = fits and number(unet, "projection_class_embeddings_input_dim", 0) == pooled + sizes
    if not fits:
        raise UserError(
            f"{where} is {each.title}-like model whose UNet and text encoders do not fit together (the text is "
            f"{width} wide, the UNet takes {wanted}): give it the text encoders that it was trained with."
        )


def require(found: str, architecture: str, where: str) -> None:
    """UserError, naming the right script, for a base of another architecture than the script's."""
    if found != architecture:
        raise UserError(f"{where} is {ARCHITECTURES[found].title} base: train it with {ARCHITECTURES[found].script}.")
