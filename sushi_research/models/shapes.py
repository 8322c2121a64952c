"""The configs of a single file's components: widths, depths and vocabulary from the tensors' shapes, the rest from
`models/formats/`. For the published SD1.5 and SDXL they equal the configs of the repositories (tested at full size)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from sushi_research.errors import UserError
from sushi_research.models import ARCHITECTURES

# Tensor name, below its component's prefix, -> shape.
Shapes = Mapping[str, tuple[int, ...]]
# The deepest part, SDXL's second text encoder, has 32. A file must not make us build a model as large as it pleases.
MOST_LEVELS, MOST_LAYERS = 8, 64
# Of every CLIP; the model keeps a list of them in memory, so a file may not name another number.
POSITIONS = 77


def published(architecture: str) -> dict[str, Any]:
    """What no shape tells of an architecture: `PUBLISHED` of its formats module. Not to be written to."""
    return ARCHITECTURES[architecture].formats().PUBLISHED


def size(shapes: Shapes, name: str, axis: int = 0) -> int:
    """One side of a tensor; UserError where there is no such tensor or side.

    A tensor without values may claim any side, so it has none: the others' sides are bounded by the file's length.
    """
    shape = shapes.get(name, ())
    if axis >= len(shape) or min(shape) < 1:
        what = f"has the shape {list(shape)}" if name in shapes else "is missing"
        raise UserError(f"its tensor {name} {what}")
    return shape[axis]


def unet_config(architecture: str, shapes: Shapes, pooled: int | None) -> dict[str, Any]:
    """The config of a UNet in Stability's layout; `pooled` is the width of SDXL's pooled text, None for SD1.5 or where
    no text encoder is at hand (the published one is taken then)."""
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
    """(width of each level, layers per level, transformer blocks of each level's attention, 1 where it has none)."""
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
    """The config of a CLIP text encoder by its names in transformers, from `text_model.` on."""
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
    """The config of SDXL's second text encoder by its names in OpenCLIP."""
    return _clip(
        published(architecture)["text_encoder_2"],
        width=size(shapes, "token_embedding.weight", 1),
        layers=_count(shapes, r"transformer\.resblocks\.(\d+)\."),
        vocabulary=size(shapes, "token_embedding.weight"),
        positions=size(shapes, "positional_embedding"),
        inner=size(shapes, "transformer.resblocks.0.mlp.c_fc.weight"),
        # A linear layer's weight, as some tools keep it, is the other way round.
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
        # As the published configs have them; with 2, transformers pools at the largest id, which is the end token.
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }


def _count(shapes: Shapes, pattern: str) -> int:
    """How many different numbers the pattern's group has among the names."""
    search = re.compile(pattern)
    count = len({match[1] for match in map(search.match, shapes) if match})
    if count > MOST_LAYERS:
        raise UserError(f"it has {count} layers of one kind, more than any Stable Diffusion")
    return count
