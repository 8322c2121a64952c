"""Stable Diffusion 1.5: its constants, text encoding and UNet call. The reference page is docs/models/sd15.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sushi_research import conditioning
from sushi_research.conditioning import Chunks
from sushi_research.models import loading
from sushi_research.models.formats import number
from sushi_research.models.formats import sd15 as formats

NAME = "sd15"
TEXT_ENCODERS = formats.TEXT_ENCODERS
SCALING_FACTOR = 0.18215
# The columns of a row in the text cache, and their shapes at the real size: hidden [77, 768].
TEXT_TENSORS = ("hidden",)
# The token ids of a caption, one for each tokenizer.
TOKENS = ("ids",)
# The keys of the config's model section that decide how a caption is encoded.
TEXT_SETTINGS = ("clip_skip",)
# The diffusers pipeline class that samples from it.
PIPELINE = "StableDiffusionPipeline"
# Arguments of the pipeline class that neither training nor sampling needs.
PIPELINE_WITHOUT = {
    "safety_checker": None,
    "feature_extractor": None,
    "image_encoder": None,
    "requires_safety_checker": False,
}
# The usual guidance scale.
GUIDANCE = 7.0


@dataclass(frozen=True)
class Text:
    """The tokenizer and the text encoder (CLIP ViT-L/14)."""

    tokenizer: Any
    encoder: Any


def text_shapes(base: loading.Base) -> dict[str, tuple[int, ...]]:
    """The shapes of a caption's tensors for this base: {"hidden": (77, 768)} at the real size."""
    return {"hidden": (77, number(base.config("unet"), "cross_attention_dim", 1280))}


def load_text(base: loading.Base, device: torch.device, dtype: torch.dtype = torch.float32) -> Text:
    """Loads the tokenizer and text encoder, by default in float32 for the cache; free them when done."""
    return Text(*loading.load_text_encoder(base, "text_encoder", device, dtype))


def pipeline_text(base: loading.Base, text: Text) -> dict[str, Any]:
    """The text-encoding arguments of its pipeline class."""
    return {"tokenizer": text.tokenizer, "text_encoder": text.encoder}


def encode_captions(
    text: Text,
    captions: Sequence[str],
    chunks: Chunks = conditioning.ONE_CHUNK,
    *,
    batch: int = 1,
    clip_skip: int = 1,
) -> list[tuple[dict[str, torch.Tensor], int]]:
    """`encode_caption` of several captions, `batch` chunks at a time (`conditioning.in_batches`)."""
    ids, cut = zip(*(conditioning.chunk_ids(text.tokenizer, caption, chunks) for caption in captions), strict=True)
    (hidden,) = conditioning.in_batches(
        lambda rows: (conditioning.encode_one(text.encoder, rows, clip_skip),), batch, torch.cat(ids)
    )
    parts = hidden.split([len(each) for each in ids])
    return [({"hidden": conditioning.join_chunks(part, chunks)}, lost) for part, lost in zip(parts, cut, strict=True)]


def encode_caption(
    text: Text, caption: str, chunks: Chunks = conditioning.ONE_CHUNK, *, clip_skip: int = 1
) -> tuple[dict[str, torch.Tensor], int]:
    """({"hidden": [77 N, 768] fp32}, number of tokens cut off) of one caption in N chunks of 75 tokens (`Chunks`).

    They are encoded one at a time, so that the first chunk is bit for bit the embedding of a caption of one.
    """
    return encode_captions(text, [caption], chunks, clip_skip=clip_skip)[0]


def token_ids(text: Text, caption: str, chunks: Chunks = conditioning.ONE_CHUNK) -> dict[str, torch.Tensor]:
    """{"ids": [N, 77] int64} of a caption in N chunks: what `encode_ids` encodes, for text encoders that are trained."""
    return {"ids": conditioning.chunk_ids(text.tokenizer, caption, chunks)[0]}


def encode_ids(
    text: Text, ids: dict[str, torch.Tensor], layout: str = "separate", *, clip_skip: int = 1
) -> dict[str, torch.Tensor]:
    """{"hidden": [B, 77 N, 768]} of `token_ids` of B captions, [B, N, 77], in the encoder's dtype and with gradients.

    `layout` is that of `Chunks`. The values are those of `encode_captions`.
    """
    rows = ids["ids"].flatten(0, 1)
    hidden = conditioning.encode_one(text.encoder, rows, clip_skip)
    return {"hidden": conditioning.join_batch(hidden.unflatten(0, ids["ids"].shape[:2]), layout)}


def idle_layers(*, clip_skip: int = 1) -> dict[str, int]:
    """How many of the last layers of each text encoder do not reach the UNet: an adapter on them learns nothing."""
    return {"text_encoder": clip_skip - 1}


def encode_prompt(text: Text, prompt: str, *, clip_skip: int = 1) -> dict[str, torch.Tensor]:
    """{"hidden": [77 N, 768] fp32} of a prompt in N chunks of 75 tokens; for one that fits, as `encode_caption`."""
    return encode_caption(text, prompt, conditioning.ALL_CHUNKS, clip_skip=clip_skip)[0]


def predict(
    unet: Any,
    noisy: torch.Tensor,
    timesteps: torch.Tensor,
    text: dict[str, torch.Tensor],
    time_ids: torch.Tensor | None = None,
    *,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The UNet's prediction [B, 4, H/8, W/8] in its dtype; `text` is that of `batch_text`: "hidden" [B, 77 N, 768].

    `dtype` is the UNet's. It is passed because `unet.dtype` walks all modules each time it is read.

    SD1.5 has no size conditioning; `time_ids` is ignored and exists so that both architectures have the same signature.
    """
    return unet(
        noisy.to(dtype),
        timesteps,
        encoder_hidden_states=text["hidden"].to(dtype),
        encoder_attention_mask=text.get("mask"),
        return_dict=False,
    )[0]
