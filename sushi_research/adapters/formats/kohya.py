"""kohya's sd-scripts, whose naming most programs write: `lora_unet_<module with underscores>.lora_down.weight`.

The number of a text encoder is only in names for SDXL, which has two. SDXL's UNet is named after Stability's blocks
(`input_blocks_4_1`), SD1.5's after diffusers'; other programs write diffusers' names for SDXL too. ai-toolkit and OneTrainer
(KOHYA, LEGACY) write this naming.
"""

from sushi_research.adapters.formats import Naming

NAMING = Naming(
    {
        "lora_unet_": "unet",
        "lora_te_": "text_encoder",
        "lora_te1_": "text_encoder",
        "lora_te2_": "text_encoder_2",
    },
    {
        ".lora_down.weight": "down",
        ".lora_up.weight": "up",
        ".lora_mid.weight": "mid",
        ".alpha": "alpha",
        ".dora_scale": "magnitude",
    },
)
# Prefixes that an architecture with one text encoder does not have, and those that one with two does not have.
OF_TWO_ENCODERS, OF_ONE_ENCODER = ("lora_te1_", "lora_te2_"), ("lora_te_",)
