"""Names what a file holds that is no adapter that can be read, from its tensors' names."""

from __future__ import annotations

import re

from sushi_research.models import detect
from sushi_research.models.header import Header

# A pattern that is searched in a tensor's name, and the kind of adapter that has such tensors. The first match counts.
KINDS = (
    (r"\.b?oft_|\.oft\.|\.rescale$", "an OFT"),
    (r"\.(a1|a2|b1|b2|bm|bm1|bm2)\.weight$|\.glora_", "a GLoRA (LyCORIS)"),
    (r"\.on_input$|\.ia3_l", "an IA3"),
    (r"\.lora_embedding_", "a LoRA of an embedding layer"),
    (r"\.(lora_)?(down|up)_list\.", "a DyLoRA (LyCORIS)"),
    (r"\.(q_layer|p_layer)\.weight$|\.lambda_layer$", "a T-LoRA (LyCORIS)"),
    (r"\.vera_lambda|^base_model\.vera_A", "a VeRA"),
    (
        r"\.(fourierft_spectrum|randlora_|hra_u|bone_|miss_|shira_|c3a_|ln_tuning_|waveft_|lora_ga_)",
        "an adapter of peft",
    ),
    (r"\.scalar$", "a LoRA with a learned scale (LyCORIS)"),
    (r"\.set_weight$|\.reshape_weight$", "whole weights in place of differences (ComfyUI)"),
    (r"^(emb_params$|string_to_param\b|clip_[lg]$|bundle_emb\.)", "a textual inversion embedding"),
)
# The first of detect's kinds is an adapter.
_MODELS = detect.KINDS[1:]


def other_kind(key: str) -> str | None:
    """The kind of adapter that cannot be read to which a tensor of this name belongs; None if none is known."""
    return next((kind for pattern, kind in KINDS if re.search(pattern, key)), None)


def without_entries(header: Header) -> str:
    """What a file without any part of an adapter is: "an SDXL base", "a VAE alone", or a list of its tensors."""
    names = [detect.UNET_PREFIX.sub("", key) for key in header.tensors]
    for kind in _MODELS:
        if any(re.match(kind.pattern, name) for name in names):
            return kind.name
    if detect.FIRST in names:
        return "a whole model (a checkpoint)"
    if kind := detect.component_alone(names):
        return kind
    first = min(header.tensors)
    shown = first if first.isprintable() and 0 < len(first) <= 200 else "with unreadable names"
    return f"of an unknown kind (its tensors: {shown} and {len(header.tensors) - 1:,} more)"
