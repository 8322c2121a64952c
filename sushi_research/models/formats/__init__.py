"""How each architecture is recognised and stored, one module each: detection rules, the layout of single files, published
configs, and names in adapter files. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from sushi_research.errors import UserError

# The result of a detection rule: True if the base has the architecture, False if not, or the name of a related unsupported
# model. The base is refused by that name, unless another architecture's rule returns True.
Match = bool | str

# A component in a single file: its possible prefixes, and a tensor (without the prefix) that shows that it is present.
Place = tuple[tuple[str, ...], str]
PLACES: dict[str, Place] = {
    "unet": (("model.diffusion_model.", "diffusion_model.", ""), "input_blocks.0.0.weight"),
    "vae": (("first_stage_model.", ""), "decoder.conv_in.weight"),
}

# The noise schedule that every Stable Diffusion was trained on, and the timestep spacing that their repositories set.
SCHEDULER: dict[str, Any] = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "timestep_spacing": "leading",
    "steps_offset": 1,
}

# The sizes of CLIP ViT-L/14, the text encoder of SD1.5 and the first of SDXL.
CLIP_L: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "projection_dim": 768,
}


class FileUNet(NamedTuple):
    """Facts about a single file's UNet and its conditioning, from tensor names and shapes."""

    context: int  # width of the text embedding
    linear: bool  # whether the attention's projections are linear layers
    added: int | None  # input width of the embedding that is added to the time embedding; None without one
    open_clip: bool  # whether the only text encoder is OpenCLIP's


def number(config: Mapping[str, Any], key: str, default: int) -> int:
    """An integer from a config; `default` (the library's own) if the key is missing, UserError for another type."""
    value = config.get(key)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise UserError(
            f"a config.json of the base has {value!r:.60} as its {key}, but that must be an integer: download it again."
        )
    return default if value is None else value
