"""peft's settings of an adapter file: ranks and alphas by module.

diffusers writes them into the metadata, under one JSON key. peft's own `save_pretrained` writes them to a file beside it.
"""

from __future__ import annotations

import contextlib
import math
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

from sushi_research.adapters.formats import names
from sushi_research.errors import UserError
from sushi_research.models.header import Header
from sushi_research.user_files import parse_json, read_regular, readable

KEY = "lora_adapter_metadata"
# Settings that change what is computed in another way than an entry does (entries.py), and their values that do not.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "peft_type": (None, "LORA"),
    "use_dora": (None, False, True),
    "lora_bias": (None, False, True),
    "bias": (None, "none"),
    "use_qalora": (None, False),
    "modules_to_save": (None, []),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None, []),
    "target_parameters": (None, []),
    "use_bdlora": (None, False),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "fan_in_fan_out": (None, False),
    # Others (pissa, olora, corda, loftq) change the base's weights too.
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal"),
}

# The names of the two files that peft writes.
OF_PEFT, BESIDE = "adapter_model.safetensors", "adapter_config.json"
MAX_BYTES = 16 * 2**20


class Settings(NamedTuple):
    """Component -> the entries of peft's LoraConfig; `where` is where they stand, for messages."""

    where: str
    components: dict[str, dict[str, Any]]


def read(header: Header) -> Settings | None:
    """The settings; None without any. UserError if they cannot be read, or ask for something else than an entry."""
    beside = header.path.parent / BESIDE
    if (text := header.metadata.get(KEY)) is not None:
        where, component = f"{header.path}: its metadata {KEY}", None
    elif header.path.name == OF_PEFT and beside.is_file():
        with readable():
            text = read_regular(beside, MAX_BYTES).decode("utf-8", "replace")
        where, component = f"{header.path}: {BESIDE} beside it", "unet"
    else:
        return None
    entries = parse_json(text, where, "take another copy of the adapter.")
    if not isinstance(entries, dict):
        raise UserError(f"{where} is not a JSON object: take another copy of the adapter.")
    if not entries:
        return None
    settings: dict[str, dict[str, Any]] = {}
    for key, value in entries.items():
        owner, name = (component, key) if component else (key.partition(".")[0], key.partition(".")[2])
        settings.setdefault(owner, {})[name] = value
        # `==` alone would take 0 for False and 1 for True.
        if name in NEUTRAL and not any(value == each and type(value) is type(each) for each in NEUTRAL[name]):
            raise UserError(
                f"{header.path} was saved with {key} = {value!r:.60}, which cannot be used here: give a LoRA file "
                "without that setting."
            )
    return Settings(where, settings)


def alpha_of(settings: Settings, path: Path, name: str, rank: int, has_magnitude: bool) -> float:
    """The alpha that the settings give a module, so that the scale is alpha / rank. UserError if they do not fit the module.

    `has_magnitude` is whether it has the magnitude of a DoRA, which it must have with `use_dora`.

    As in peft: patterns are regular expressions for the end of a module's path, and with `use_rslora` the scale is
    alpha / sqrt(rank) (arXiv 2312.03732).
    """
    where = settings.where
    component, prefix, module = names.split(name) or ("", "_", "")
    chosen = None if prefix.endswith("_") else settings.components.get(component)  # peft has no names with underscores
    if chosen is None:
        raise UserError(f"{where} says nothing about {name}: take another copy of the adapter.")
    if chosen.get("use_dora") and not has_magnitude:
        raise UserError(
            f"{path} was saved with {component}.use_dora = True, but {name} has no magnitude: take a complete copy."
        )
    stored_rank = _number(where, chosen, component, "r", "rank_pattern", module)
    if stored_rank != rank:
        raise UserError(
            f"{where} gives {name} the rank {stored_rank:g}, but its matrices have rank {rank}: "
            "take another copy of the adapter."
        )
    alpha = _number(where, chosen, component, "lora_alpha", "alpha_pattern", module)
    rslora = chosen.get("use_rslora") or False
    if not isinstance(rslora, bool):
        raise UserError(f"{where} has use_rslora = {rslora!r:.60}: take another copy of the adapter.")
    return alpha * math.sqrt(rank) if rslora else alpha


def _is_slow(pattern: str) -> bool:
    """Whether a regular expression may take longer than the third power of a name's length: many repeats, or repeated groups."""
    return len(pattern) > 300 or len(re.findall(r"[*+?{]", pattern)) > 3 or re.search(r"\)[*+{]", pattern) is not None


def _number(where: str, chosen: dict[str, Any], component: str, key: str, pattern_key: str, module: str) -> float:
    """The value of `key` for a module: of the first pattern that its path matches, or the general one."""
    from peft.utils.other import get_pattern_key

    patterns, value = chosen.get(pattern_key) or {}, None
    if isinstance(patterns, dict):
        if slow := [key for key in patterns if _is_slow(key)]:
            raise UserError(
                f"{where} has {slow[0]!r:.60} in {component}.{pattern_key}, a pattern that can take hours to "
                "match: take another copy of the adapter."
            )
        with contextlib.suppress(re.error, OverflowError, RecursionError):
            value = patterns.get(get_pattern_key(patterns.keys(), module), chosen.get(key))
    # An integer of JSON can be too large for a float, and math.isfinite raises OverflowError for it.
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= sys.float_info.max:
        raise UserError(
            f"{where} has no usable {component}.{key} or {component}.{pattern_key} for {module}: "
            "take another copy of the adapter."
        )
    return float(value)
