"""How each architecture is recognised and stored, one module each: detection rules, the layout of single files, the published
configs, the names in adapter files. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from sushi_research.errors import UserError

# What a rule says: True where the base is of its architecture, False where it is not, or the name of a near relative that
# only looks like it. A relative is refused by that name, unless another architecture takes the base for its own.
Match = bool | str

# A component in a single file: the prefixes that it may have there, and a tensor below the prefix that shows that it is there.
Place = tuple[tuple[str, ...], str]
PLACES: dict[str, Place] = {
    "unet": (("model.diffusion_model.", "diffusion_model.", ""), "input_blocks.0.0.weight"),
    "vae": (("first_stage_model.", ""), "decoder.conv_in.weight"),
}

# The noise schedule that every Stable Diffusion was trained on, and the spacing of timesteps that their repositories name.
SCHEDULER: dict[str, Any] = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "timestep_spacing": "leading",
    "steps_offset": 1,
}


class FileUNet(NamedTuple):
    """What the names and shapes of a single file tell of its UNet and of the text that feeds it."""

    context: int  # width of the text
    linear: bool  # the attention's projections are linear layers
    added: int | None  # width of what is added to the time embedding, None where nothing is
    open_clip: bool  # the only text encoder is OpenCLIP's


def number(config: Mapping[str, Any], key: str, default: int) -> int:
    """A whole number of a config, `default` where it is not there (diffusers' and transformers' own); UserError otherwise."""
    value = config.get(key)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise UserError(
            f"a config.json of the base has {value!r:.60} as its {key}, where a number belongs: download it again."
        )
    return default if value is None else value
