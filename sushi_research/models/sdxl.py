"""SDXL base: its constants, text encoding and UNet call. The reference page is docs/models/sdxl.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sushi_research import conditioning
from sushi_research.conditioning import Chunks
from sushi_research.models import loading
from sushi_research.models.formats import number
from sushi_research.models.formats import sdxl as formats

NAME = "sdxl"
TEXT_ENCODERS = formats.TEXT_ENCODERS
SCALING_FACTOR = 0.13025
# The columns of a row in the text cache, and their shapes at the real size: hidden [77, 2048], pooled [1280].
TEXT_TENSORS = ("hidden", "pooled")
# The token ids of a caption, one for each tokenizer.
TOKENS = ("ids_1", "ids_2")
# The keys of the config's model section that decide how a caption is encoded.
TEXT_SETTINGS = ("text_encoder_1_layer",)
# The diffusers pipeline class that samples from it.
PIPELINE = "StableDiffusionXLPipeline"
# Arguments of the pipeline class that neither training nor sampling needs.
PIPELINE_WITHOUT = {"feature_extractor": None, "image_encoder": None}
# The usual guidance scale.
GUIDANCE = 5.0


@dataclass(frozen=True)
class Text:
    """Both tokenizers and text encoders (CLIP ViT-L/14 and OpenCLIP ViT-bigG/14)."""

    tokenizer_1: Any
    encoder_1: Any
    tokenizer_2: Any
    encoder_2: Any


def text_shapes(base: loading.Base) -> dict[str, tuple[int, ...]]:
    """The shapes of a caption's tensors for this base: {"hidden": (77, 2048), "pooled": (1280,)} at the real size."""
    width = number(base.config("unet"), "cross_attention_dim", 1280)
    return {"hidden": (77, width), "pooled": (number(base.config("text_encoder_2"), "projection_dim", 512),)}


def load_text(base: loading.Base, device: torch.device, dtype: torch.dtype = torch.float32) -> Text:
    """Loads the tokenizers and text encoders, by default in float32 for the cache; free them when done."""
    return Text(
        *loading.load_text_encoder(base, "text_encoder", device, dtype),
        *loading.load_text_encoder(base, "text_encoder_2", device, dtype),
    )


def pipeline_text(base: loading.Base, text: Text) -> dict[str, Any]:
    """The text-encoding arguments of its pipeline class."""
    return {
        "tokenizer": text.tokenizer_1,
        "text_encoder": text.encoder_1,
        "tokenizer_2": text.tokenizer_2,
        "text_encoder_2": text.encoder_2,
        "force_zeros_for_empty_prompt": base.force_zeros,
    }


def encode_captions(
    text: Text,
    captions: Sequence[str],
    chunks: Chunks = conditioning.ONE_CHUNK,
    *,
    batch: int = 1,
    text_encoder_1_layer: str = "penultimate",
) -> list[tuple[dict[str, torch.Tensor], int]]:
    """`encode_caption` of several captions, `batch` chunks at a time (`conditioning.in_batches`)."""
    read = [
        [conditioning.chunk_ids(tokenizer, caption, chunks) for caption in captions]
        for tokenizer in (text.tokenizer_1, text.tokenizer_2)
    ]
    first, second = ([ids for ids, _ in each] for each in read)
    cut = [max(cut_1, cut_2) for (_, cut_1), (_, cut_2) in zip(*read, strict=True)]
    hidden, pooled = conditioning.in_batches(
        lambda ids_1, ids_2: conditioning.encode_two(
            text.encoder_1, text.encoder_2, ids_1, ids_2, text_encoder_1_layer
        ),
        batch,
        torch.cat(first),
        torch.cat(second),
    )
    counts = [len(ids) for ids in first]
    return [
        ({"hidden": conditioning.join_chunks(part, chunks), "pooled": of_chunks[0]}, lost)
        for part, of_chunks, lost in zip(hidden.split(counts), pooled.split(counts), cut, strict=True)
    ]


def encode_caption(
    text: Text, caption: str, chunks: Chunks = conditioning.ONE_CHUNK, *, text_encoder_1_layer: str = "penultimate"
) -> tuple[dict[str, torch.Tensor], int]:
    """({"hidden": [77 N, 2048] fp32, "pooled": [1280] fp32}, number of tokens cut off) of one caption in N chunks of 75 tokens.

    "pooled" is the first chunk's. `chunks` says how many are read at most (`Chunks`). They are encoded one at a time, so that the
    first chunk is bit for bit the embedding of a caption of one.
    """
    return encode_captions(text, [caption], chunks, text_encoder_1_layer=text_encoder_1_layer)[0]


def token_ids(text: Text, caption: str, chunks: Chunks = conditioning.ONE_CHUNK) -> dict[str, torch.Tensor]:
    """{"ids_1", "ids_2": [N, 77] int64} of a caption in N chunks, of each tokenizer: what `encode_ids` encodes.

    For text encoders that are trained.
    """
    tokenizers = {"ids_1": text.tokenizer_1, "ids_2": text.tokenizer_2}
    return {name: conditioning.chunk_ids(tokenizer, caption, chunks)[0] for name, tokenizer in tokenizers.items()}


def encode_ids(
    text: Text, ids: dict[str, torch.Tensor], layout: str = "separate", *, text_encoder_1_layer: str = "penultimate"
) -> dict[str, torch.Tensor]:
    """{"hidden": [B, 77 N, 2048], "pooled": [B, 1280]} of `token_ids` of B captions, [B, N, 77], with gradients.

    In the encoders' dtype. "pooled" is the first chunk's. `layout` is that of `Chunks`. The values are those of `encode_captions`.
    """
    shape = ids["ids_1"].shape[:2]
    hidden, pooled = conditioning.encode_two(
        text.encoder_1, text.encoder_2, ids["ids_1"].flatten(0, 1), ids["ids_2"].flatten(0, 1), text_encoder_1_layer
    )
    joined = conditioning.join_batch(hidden.unflatten(0, shape), layout)
    return {"hidden": joined, "pooled": pooled.unflatten(0, shape)[:, 0]}


def idle_layers(*, text_encoder_1_layer: str = "penultimate") -> dict[str, int]:
    """How many of the last layers of each text encoder do not reach the UNet: an adapter on them learns nothing.

    The pooled embedding comes from the last layer of the second one.
    """
    return {"text_encoder": int(text_encoder_1_layer == "penultimate"), "text_encoder_2": 0}


def encode_prompt(text: Text, prompt: str, *, text_encoder_1_layer: str = "penultimate") -> dict[str, torch.Tensor]:
    """{"hidden": [77 N, 2048] fp32, "pooled": [1280] fp32} of a prompt in N chunks of 75 tokens; "pooled" is the first chunk's.

    For a prompt that fits, as `encode_caption`.
    """
    return encode_caption(text, prompt, conditioning.ALL_CHUNKS, text_encoder_1_layer=text_encoder_1_layer)[0]


def predict(
    unet: Any,
    noisy: torch.Tensor,
    timesteps: torch.Tensor,
    text: dict[str, torch.Tensor],
    time_ids: torch.Tensor,
    *,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The UNet's prediction [B, 4, H/8, W/8] in its dtype.

    `text` is that of `conditioning.batch_text`: "hidden" [B, 77 N, 2048] and "pooled" [B, 1280]; `time_ids` [B, 6] float32 (the
    UNet embeds the sizes in float32). `dtype` is the UNet's. It is passed because `unet.dtype` walks all modules (7,530) each time
    it is read.
    """
    assert time_ids.dtype == torch.float32
    return unet(
        noisy.to(dtype),
        timesteps,
        encoder_hidden_states=text["hidden"].to(dtype),
        added_cond_kwargs={"text_embeds": text["pooled"].to(dtype), "time_ids": time_ids},
        encoder_attention_mask=text.get("mask"),
        return_dict=False,
    )[0]
