"""Names what a file holds that is not a LoRA of low-rank pairs, from its tensors' names."""

from __future__ import annotations

import re

from sushi_research.models import detect
from sushi_research.models.header import Header

# A pattern that is searched in a tensor's name, and the kind of adapter that has such tensors. The first match counts.
KINDS = (
    (r"\.hada_", "a LoHa (LyCORIS)"),
    (r"\.lokr_", "a LoKr (LyCORIS)"),
    (r"\.b?oft_|\.oft\.", "an OFT"),
    (r"\.(a1|a2|b1|b2|bm1|bm2)\.weight$", "a GLoRA (LyCORIS)"),
    (r"\.on_input$|\.ia3_l", "an IA3"),
    (r"\.dora_scale$|\.lora_magnitude_vector", "a DoRA"),
    (r"\.lora_mid\.", "a LoCon with Tucker decomposition"),
    (r"\.(diff|diff_b|set_weight|w_norm|b_norm)$", "full differences of weights"),
    (r"\.(lora_(down|up|A|B)|lora\.(down|up))\.(\w+\.)?bias$", "a LoRA with biases"),
    (r"\.lora_embedding_", "a LoRA of an embedding layer"),
    (r"\.(lora_)?(down|up)_list\.", "a DyLoRA (LyCORIS)"),
    (r"\.vera_lambda", "a VeRA"),
    (r"\.scalar$", "a LoRA with a learned scale (LyCORIS)"),
    (r"^(emb_params$|string_to_param\b|clip_[lg]$|bundle_emb\.)", "a textual inversion embedding"),
)
# The first of detect's kinds is an adapter.
_MODELS = detect.KINDS[1:]


def other_kind(key: str) -> str | None:
    """The kind of adapter, other than low-rank pairs, that a tensor of this name belongs to; None if none is known."""
    return next((kind for pattern, kind in KINDS if re.search(pattern, key)), None)


def without_pairs(header: Header) -> str:
    """What a file without any low-rank pair is: "an SDXL base", "a VAE alone", or a list of its tensors."""
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
