"""The UNet's conditioning: tokens, text embeddings of one or two encoders, pooled embedding, time_ids.

Bit for bit equal to `encode_prompt` of diffusers' StableDiffusionPipeline and StableDiffusionXLPipeline (tested). Shapes:
B captions of 77 tokens; D is the width of an encoder, 768 for CLIP ViT-L and 1280 for OpenCLIP ViT-bigG.

A caption of training is cut after 75 tokens, and its start and end token make 77. A prompt is read in chunks of 75, as ComfyUI
(`comfy/sd1_clip.py`) and A1111 (`modules/sd_hijack_clip.py`) do: each chunk is encoded by itself with a start and an end token, the
embeddings are concatenated, and the pooled embedding is that of the first chunk. Both end a chunk earlier where it would divide a
word (ComfyUI) or a phrase (A1111), which we do not: docs/samples.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch


@dataclass(frozen=True)
class Tokens:
    """`ids` [B, 77] int64, padded with the tokenizer's pad token; `cut[b]` is the number of tokens cut off caption b."""

    ids: torch.Tensor
    cut: tuple[int, ...]


def tokenize(tokenizer: Any, captions: Sequence[str]) -> Tokens:
    """Tokenises captions and truncates them to 77 tokens (including start and end token).

    The pad tokens differ: SD1.5's tokenizer and SDXL's first one pad with the end token, SDXL's second one with `!` (id 0).
    """
    length = tokenizer.model_max_length
    ids = tokenizer(
        list(captions), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
    # verbose=False: the caller reports long captions itself.
    full = tokenizer(list(captions), padding=False, truncation=False, verbose=False).input_ids
    return Tokens(ids, tuple(max(0, len(row) - length) for row in full))


def tokenize_chunks(tokenizer: Any, prompt: str) -> torch.Tensor:
    """The ids [N, 77] of a prompt of any length: chunks of 75 tokens, each with its own start and end token, the last one padded.

    A prompt that fits has one chunk, which is equal to that of `tokenize`.
    """
    return tokenizer(
        [prompt],
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_overflowing_tokens=True,
        return_tensors="pt",
    ).input_ids


@torch.no_grad()
def encode_one(text_encoder: Any, ids: torch.Tensor, clip_skip: int = 1) -> torch.Tensor:
    """SD1.5's text embedding [B, 77, D] of ids [B, 77].

    `clip_skip` counts as in kohya and A1111: 1 is the last layer, 2 the second to last. The final layer norm is always
    applied. (In diffusers' pipelines, our 1 is `clip_skip=None` and our 2 is `clip_skip=1`.)
    """
    output = text_encoder(ids.to(text_encoder.device), output_hidden_states=True)
    if clip_skip == 1:
        return output.last_hidden_state
    return _inner(text_encoder).final_layer_norm(output.hidden_states[-clip_skip])


@torch.no_grad()
def encode_two(
    text_encoder_1: Any,
    text_encoder_2: Any,
    ids_1: torch.Tensor,
    ids_2: torch.Tensor,
    text_encoder_1_layer: Literal["penultimate", "last"] = "penultimate",
) -> tuple[torch.Tensor, torch.Tensor]:
    """SDXL's text embedding [B, 77, D1 + D2] and pooled embedding [B, projection] of each tokenizer's ids [B, 77].

    Both encoders return their penultimate layer without the final layer norm, as in SDXL's training. `"last"` uses the first
    encoder's normalised last layer instead; see docs/models/sdxl.md.
    """
    first = text_encoder_1(ids_1.to(text_encoder_1.device), output_hidden_states=True)
    second = text_encoder_2(ids_2.to(text_encoder_2.device), output_hidden_states=True)
    hidden_1 = first.last_hidden_state if text_encoder_1_layer == "last" else first.hidden_states[-2]
    return concatenate(hidden_1, second.hidden_states[-2]), second.text_embeds


def concatenate(hidden_1: torch.Tensor, hidden_2: torch.Tensor) -> torch.Tensor:
    """Concatenates two encoders' embeddings: [B, 77, D1] and [B, 77, D2] to [B, 77, D1 + D2] (768 + 1280 = 2048)."""
    assert hidden_1.shape[:2] == hidden_2.shape[:2], (hidden_1.shape, hidden_2.shape)
    return torch.cat([hidden_1, hidden_2], dim=-1)


def time_ids(rows: Sequence[tuple[int, int, int, int, int, int]]) -> torch.Tensor:
    """SDXL's micro-conditioning [B, 6]: original height, width, crop top, left, target height, width, in pixels.

    Always float32: bfloat16 turns 1023 into 1024, float16 turns 2049 into 2048.
    """
    return torch.tensor(rows, dtype=torch.float32)


def _inner(text_encoder: Any) -> Any:
    # transformers 5.6 flattened CLIPTextModel: older versions have the layers under `text_model`.
    return getattr(text_encoder, "text_model", text_encoder)
