"""Config keys with another name now, and values that are written in another way. The error for an old key gives the new name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Old dotted name -> new dotted name.
RENAMED = {
    "evaluation.draws": "evaluation.noise_samples",
    "strengths": "lora_scales",
}
# By new name: what older versions wrote -> what it is now.
VALUES = {"train.gradient_checkpointing": {True: "all", False: "none"}}


def with_new_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The flat settings of a run that an older version may have made, under the names and with the values of this version."""
    renamed = {RENAMED.get(key, key): value for key, value in settings.items()}
    return {
        key: VALUES.get(key, {}).get(value, value) if isinstance(value, bool) else value
        for key, value in renamed.items()
    }
