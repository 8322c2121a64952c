"""diffusers and peft: `unet.<module>.lora_A.weight`, and the spellings from before diffusers used peft.

`save_lora_weights` writes the three prefixes; `save_attn_procs` of old versions wrote the UNet without one. peft's own
`save_pretrained` puts `base_model.model.` before it, and scripts that gave peft's names to `save_lora_weights` have it after the
component (`unet.base_model.model.`). The attention processors of old versions were modules of their own
(`attn1.processor.to_q_lora.down.weight`), in text encoders `self_attn.to_q_lora.down.weight` for `self_attn.q_proj`. DoRA's
magnitude is always that of the outputs (peft's `DoraLinearLayer`), and an adapter's bias is one of `lora_B`, which the scale
multiplies.
SimpleTuner and OneTrainer (DIFFUSERS) write this naming.
"""

import re

from sushi_research.adapters.formats import Naming

NAMING = Naming(
    {"unet.": "unet", "text_encoder.": "text_encoder", "text_encoder_2.": "text_encoder_2"},
    {
        ".lora_A.weight": "down",
        ".lora.down.weight": "down",
        ".lora_linear_layer.down.weight": "down",
        ".lora_B.weight": "up",
        ".lora.up.weight": "up",
        ".lora_linear_layer.up.weight": "up",
        ".lora_magnitude_vector": "output_magnitude",
        ".lora_magnitude_vector.weight": "output_magnitude",
        ".lora_B.bias": "up_bias",
    },
    (
        "conv_in",
        "time_embedding",
        "add_embedding",
        "down_blocks",
        "mid_block",
        "up_blocks",
        "conv_norm_out",
        "conv_out",
    ),
)
PEFT_PREFIX = "base_model.model."
# peft puts the adapter's name before the last part while it is in memory.
_DEFAULT = re.compile(r"(\.lora_(?:A|B|magnitude_vector))\.default(?=\.|$)")
_OLD = re.compile(r"\.to_(q|k|v|out)_lora\.(down|up)\.weight$")


def spelled_now(key: str) -> str:
    """A tensor's name in the newest spelling; other names are returned as they are."""
    owner = next((prefix for prefix in NAMING.prefixes if key.startswith(prefix + PEFT_PREFIX)), "")
    inner = key.removeprefix(owner).removeprefix(PEFT_PREFIX)
    if owner or inner.partition(".")[0] in NAMING.bare:
        key = owner + inner
    key = _DEFAULT.sub(r"\1", key).replace(".processor.", ".")
    if old := _OLD.search(key):
        if key.startswith("text_"):
            layer = f"{old[1]}_proj"
        else:
            layer = f"to_{old[1]}" + (".0" if old[1] == "out" else "")
        return f"{key[: old.start()]}.{layer}.lora.{old[2]}.weight"
    return key
