"""LoRA training for Stable Diffusion 1.5 and SDXL: the parts that have one right answer."""

__version__ = "0.1.0"
