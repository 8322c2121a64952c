"""Derives the configs of a single file's components: widths, depths and vocabulary from tensor shapes, the rest from
`models/formats/`.

For the published SD1.5 and SDXL the result equals the configs of the repositories (tested at full size).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from sushi_research.errors import UserError
from sushi_research.models import ARCHITECTURES

# Tensor name, without its component's prefix -> shape.
Shapes = Mapping[str, tuple[int, ...]]
# Upper bounds, so that a damaged file cannot make us build a huge model. The deepest component, SDXL's second text encoder,
# has 32 layers.
MOST_LEVELS, MOST_LAYERS = 8, 64
# The same for every CLIP. The model allocates position ids of this length, so other lengths are refused.
POSITIONS = 77


def published(architecture: str) -> dict[str, Any]:
    """The facts of an architecture that no tensor shape shows: `PUBLISHED` of its formats module. Read-only."""
    return ARCHITECTURES[architecture].formats().PUBLISHED


def size(shapes: Shapes, name: str, axis: int = 0) -> int:
    """One dimension of a tensor; UserError if there is no such tensor or axis, or if the tensor is empty.

    The shape of a non-empty tensor is bounded by the file's length; an empty one could claim any dimension.
    """
    shape = shapes.get(name, ())
    if axis >= len(shape) or min(shape) < 1:
        what = f"has the shape {list(shape)}" if name in shapes else "is missing"
        raise UserError(f"its tensor {name} {what}")
    return shape[axis]


def unet_config(architecture: str, shapes: Shapes, pooled: int | None) -> dict[str, Any]:
    """The config of a UNet in Stability's layout.

    `pooled` is the width of SDXL's pooled text embedding. It is None for SD1.5, or if no text encoder is known; then the
    published width is used.
    """
    facts = dict(published(architecture)["unet"])
    widths, layers, depths = _levels(shapes)
    if len(widths) != len(facts["down_block_types"]):
        raise UserError(f"its UNet has {len(widths)} levels, not {len(facts['down_block_types'])}")
    facts |= {
        "block_out_channels": widths,
        "layers_per_block": layers,
        "cross_attention_dim": size(shapes, "middle_block.1.transformer_blocks.0.attn2.to_k.weight", 1),
    }
    head_width = facts.pop("head_width", None)
    if head_width:
        facts["attention_head_dim"] = [max(1, width // head_width) for width in widths]
        facts["transformer_layers_per_block"] = depths
        added = size(shapes, "label_emb.0.0.weight", 1)
        facts["projection_class_embeddings_input_dim"] = added
        if pooled:
            facts["addition_time_embed_dim"] = max(1, (added - pooled) // 6)
    return facts


def _levels(shapes: Shapes) -> tuple[list[int], int, list[int]]:
    """(width of each level, layers per level, transformer blocks of each level's attention; 1 for a level without)."""
    levels: list[list[int]] = [[]]
    depths: list[int] = [1]
    number = 1
    while number <= MOST_LAYERS and len(levels) <= MOST_LEVELS:
        if f"input_blocks.{number}.0.op.weight" in shapes:
            levels.append([])
            depths.append(1)
        elif f"input_blocks.{number}.0.out_layers.3.weight" in shapes:
            levels[-1].append(size(shapes, f"input_blocks.{number}.0.out_layers.3.weight"))
            depths[-1] = max(1, _count(shapes, rf"input_blocks\.{number}\.1\.transformer_blocks\.(\d+)\."))
        else:
            break
        number += 1
    layers = len(levels[0])
    if (
        number > MOST_LAYERS
        or len(levels) > MOST_LEVELS
        or layers == 0
        or any(len(level) != layers or len(set(level)) != 1 for level in levels)
    ):
        raise UserError("its UNet's blocks are not those of Stable Diffusion")
    return [level[0] for level in levels], layers, depths


def vae_config(architecture: str, shapes: Shapes) -> dict[str, Any]:
    """The config of an AutoencoderKL in Stability's layout."""
    count = _count(shapes, r"encoder\.down\.(\d+)\.block\.")
    if count > MOST_LEVELS:
        raise UserError(f"it has {count} levels, more than any Stable Diffusion")
    widths = [size(shapes, f"encoder.down.{level}.block.0.conv1.weight") for level in range(count)]
    return published(architecture)["vae"] | {
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * count,
        "up_block_types": ["UpDecoderBlock2D"] * count,
        "layers_per_block": _count(shapes, r"encoder\.down\.0\.block\.(\d+)\."),
        "latent_channels": size(shapes, "post_quant_conv.weight"),
        "norm_num_groups": 32,
    }


def clip_config(architecture: str, shapes: Shapes) -> dict[str, Any]:
    """The config of a CLIP text encoder with transformers' tensor names, which begin with `text_model.`."""
    layers = _count(shapes, r"text_model\.encoder\.layers\.(\d+)\.")
    width = size(shapes, "text_model.embeddings.token_embedding.weight", 1)
    return _clip(
        published(architecture)["text_encoder"],
        width=width,
        layers=layers,
        vocabulary=size(shapes, "text_model.embeddings.token_embedding.weight"),
        positions=size(shapes, "text_model.embeddings.position_embedding.weight"),
        inner=size(shapes, "text_model.encoder.layers.0.mlp.fc1.weight"),
        projection=width,
    )


def open_clip_config(architecture: str, shapes: Shapes) -> dict[str, Any]:
    """The config of SDXL's second text encoder with OpenCLIP's tensor names."""
    return _clip(
        published(architecture)["text_encoder_2"],
        width=size(shapes, "token_embedding.weight", 1),
        layers=_count(shapes, r"transformer\.resblocks\.(\d+)\."),
        vocabulary=size(shapes, "token_embedding.weight"),
        positions=size(shapes, "positional_embedding"),
        inner=size(shapes, "transformer.resblocks.0.mlp.c_fc.weight"),
        # Some tools store it as a linear layer's weight, which is transposed.
        projection=size(shapes, "text_projection", 1)
        if "text_projection" in shapes
        else size(shapes, "text_projection.weight"),
    )


def _clip(
    facts: Mapping[str, Any], *, width: int, layers: int, vocabulary: int, positions: int, inner: int, projection: int
) -> dict[str, Any]:
    if positions != POSITIONS:
        raise UserError(f"its text encoder has {positions} positions, not {POSITIONS}")
    return {
        **facts,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // 64),  # a head is 64 wide in every CLIP
        "intermediate_size": inner,
        "projection_dim": projection,
        "vocab_size": vocabulary,
        "max_position_embeddings": positions,
        # As in the published configs. For eos_token_id 2, transformers pools at the largest token id, which is the end token.
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }


def _count(shapes: Shapes, pattern: str) -> int:
    """Number of distinct values of the pattern's group among the tensor names."""
    search = re.compile(pattern)
    count = len({match[1] for match in map(search.match, shapes) if match})
    if count > MOST_LAYERS:
        raise UserError(f"it has {count} layers of one kind, more than any Stable Diffusion")
    return count
