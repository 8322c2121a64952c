"""The UNet's conditioning: tokens, text embeddings of one or two encoders, pooled embedding, time_ids.

Bit for bit equal to `encode_prompt` of diffusers' StableDiffusionPipeline and StableDiffusionXLPipeline (tested). Shapes:
B captions of 77 tokens; D is the width of an encoder, 768 for CLIP ViT-L and 1280 for OpenCLIP ViT-bigG.

A caption of training is cut after 75 tokens by default, and its start and end token make 77. More are read in chunks of 75, as
ComfyUI (`comfy/sd1_clip.py`) and A1111 (`modules/sd_hijack_clip.py`) read prompts: each chunk is encoded by itself with a start
and an end token, the embeddings are concatenated, and the pooled embedding is that of the first chunk. Both end a chunk earlier
where it would divide a word (ComfyUI) or a phrase (A1111), which we do not: docs/samples.md. kohya's sd-scripts fill every caption
up to the same number of chunks, and keep only the first start token and the last token of their embeddings (`Chunks`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch


@dataclass(frozen=True)
class Tokens:
    """`ids` [B, 77] int64, padded with the tokenizer's pad token; `cut[b]` is the number of tokens cut off caption b."""

    ids: torch.Tensor
    cut: tuple[int, ...]


@dataclass(frozen=True)
class Chunks:
    """How a long text is read: at most `most` chunks of 75 tokens (None: all of it), put together as `layout` says.

    "separate": as many chunks as the text needs, each of 77 embeddings. "kohya": always `most` chunks, together 75 `most` + 2.
    """

    most: int | None = 1
    layout: Literal["separate", "kohya"] = "separate"

    @property
    def settings(self) -> dict[str, Any]:
        """What must be part of a key of the embeddings: nothing, if there is one chunk."""
        return {} if self.most == 1 else {"chunks": self.most, "layout": self.layout}


ONE_CHUNK, ALL_CHUNKS = Chunks(), Chunks(None)


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


def chunk_ids(tokenizer: Any, text: str, chunks: Chunks) -> tuple[torch.Tensor, int]:
    """(ids [N, 77] of the text's chunks, number of tokens cut off)."""
    most, length = chunks.most, tokenizer.model_max_length - 2
    if most == 1:
        tokens = tokenize(tokenizer, [text])
        return tokens.ids, tokens.cut[0]
    ids = tokenize_chunks(tokenizer, text)
    cut = 0
    if most is not None:
        tokens = len(tokenizer(text, padding=False, truncation=False, verbose=False).input_ids) - 2
        cut, ids = max(0, tokens - most * length), ids[:most]
    return (_kohya_ids(tokenizer, text, most) if chunks.layout == "kohya" and most is not None else ids), cut


def _kohya_ids(tokenizer: Any, text: str, count: int) -> torch.Tensor:
    """The ids [count, 77] of `_get_input_ids` in kohya's sd-scripts (`library/strategy_base.py`).

    The text is padded to 75 count + 2 tokens and cut into chunks; each begins with the start token and ends with the last of all
    ids. Where the pad token is not the end token, a full chunk ends with the end token, and an empty one begins with it.
    """
    length = tokenizer.model_max_length - 2
    row = tokenizer(
        text, padding="max_length", truncation=True, max_length=count * length + 2, return_tensors="pt"
    ).input_ids[0]
    ids = torch.stack(
        [torch.cat([row[:1], row[start : start + length], row[-1:]]) for start in range(1, len(row) - 1, length)]
    )
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    if pad != end:
        ids[(ids[:, -2] != end) & (ids[:, -2] != pad), -1] = end
        ids[ids[:, 1] == pad, 1] = end
    return ids


def batch_ids(texts: Sequence[dict[str, torch.Tensor]], layout: str) -> dict[str, torch.Tensor]:
    """The token ids of B captions by name, [B, N, 77] for N chunks, of ids [n, 77] each.

    Captions of fewer chunks are filled up with the id 0, and "mask" [B, 77 N] bool says which of the embeddings are theirs, as in
    `batch_text`; kohya's layout has one number of chunks.
    """
    counts = [len(next(iter(text.values()))) for text in texts]
    batch = {
        name: torch.nn.utils.rnn.pad_sequence([text[name] for text in texts], batch_first=True) for name in texts[0]
    }
    if min(counts) < max(counts):
        assert layout == "separate", layout
        length = next(iter(batch.values())).shape[-1]
        batch["mask"] = torch.arange(length * max(counts)) < length * torch.tensor(counts)[:, None]
    return batch


@torch.no_grad()
def in_batches(
    encode: Callable[..., tuple[torch.Tensor, ...]], batch: int, *ids: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """The tensors [N, ...] of `encode`, which is given `batch` rows at a time of each tokenizer's ids [N, 77].

    With a batch of one, each row's are bit for bit what they are alone; larger ones may round differently.
    """
    parts = [encode(*(each[start : start + batch] for each in ids)) for start in range(0, len(ids[0]), batch)]
    return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))


def join_chunks(hidden: Sequence[torch.Tensor], chunks: Chunks) -> torch.Tensor:
    """The embeddings [77, D] of each chunk as those of the text: [77 N, D], or [75 N + 2, D] in kohya's layout."""
    if chunks.layout == "separate" or len(hidden) == 1:
        return torch.cat([*hidden])
    return torch.cat([hidden[0][:1], *(each[1:-1] for each in hidden), hidden[-1][-1:]])


def join_batch(hidden: torch.Tensor, layout: str) -> torch.Tensor:
    """The embeddings [B, N, 77, D] of B texts in N chunks, joined as `join_chunks` does: [B, 77 N, D], or [B, 75 N + 2, D]."""
    if layout == "separate" or hidden.shape[1] == 1:
        return hidden.flatten(1, 2)
    inner = hidden[:, :, 1:-1].flatten(1, 2)
    return torch.cat([hidden[:, 0, :1], inner, hidden[:, -1, -1:]], dim=1)


def batch_text(texts: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The embeddings of B captions by name, [B, ...].

    Captions of different lengths are filled up with zeros, and "mask" [B, tokens] bool says which embeddings are theirs, so that
    the UNet computes for each what it computes for it alone.
    """
    lengths = [len(text["hidden"]) for text in texts]
    batch = {name: torch.stack([text[name] for text in texts]) for name in texts[0] if name != "hidden"}
    hidden = torch.nn.utils.rnn.pad_sequence([text["hidden"] for text in texts], batch_first=True)
    if min(lengths) < max(lengths):
        batch["mask"] = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return {"hidden": hidden, **batch}


def encode_one(text_encoder: Any, ids: torch.Tensor, clip_skip: int = 1) -> torch.Tensor:
    """SD1.5's text embedding [B, 77, D] of ids [B, 77].

    `clip_skip` counts as in kohya and A1111: 1 is the last layer, 2 the second to last. The final layer norm is always
    applied. (In diffusers' pipelines, our 1 is `clip_skip=None` and our 2 is `clip_skip=1`.) Gradients are those of the caller's
    mode.
    """
    output = text_encoder(ids.to(text_encoder.device), output_hidden_states=True)
    if clip_skip == 1:
        return output.last_hidden_state
    return _inner(text_encoder).final_layer_norm(output.hidden_states[-clip_skip])


def encode_two(
    text_encoder_1: Any,
    text_encoder_2: Any,
    ids_1: torch.Tensor,
    ids_2: torch.Tensor,
    text_encoder_1_layer: Literal["penultimate", "last"] = "penultimate",
) -> tuple[torch.Tensor, torch.Tensor]:
    """SDXL's text embedding [B, 77, D1 + D2] and pooled embedding [B, projection] of each tokenizer's ids [B, 77].

    Both encoders return their penultimate layer without the final layer norm, as in SDXL's training. `"last"` uses the first
    encoder's normalised last layer instead; see docs/models/sdxl.md. Gradients are those of the caller's mode.
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
