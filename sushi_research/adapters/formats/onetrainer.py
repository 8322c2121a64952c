"""OneTrainer's formats beside kohya's and diffusers' (`LoRASaverMixin`, looked up 2026-11): ORIGINAL and COMFY.

It has five: DIFFUSERS (diffusers.py, the alpha folded into `lora_B`), KOHYA and LEGACY (kohya.py, LEGACY with diffusers' names for
SDXL), ORIGINAL (Stability's blocks without a prefix) and COMFY (with ComfyUI's own prefixes); its backups are DIFFUSERS with
kohya's endings. The endings are peft's, with `.alpha` and `.dora_scale`. ComfyUI saves its own files with COMFY's prefixes.
"""

from sushi_research.adapters.formats import Naming

NAMING = Naming(
    {
        "diffusion_model.": "unet",
        "text_encoders.clip_l.transformer.": "text_encoder",
        "text_encoders.clip_g.transformer.": "text_encoder_2",
    },
    {},
    ("input_blocks", "middle_block", "output_blocks", "time_embed", "label_emb", "out"),
)
