"""Reads an adapter file of any trainer as entries, one for each module, or refuses it with one sentence that names the cause.

Every tensor of a file is either part of an entry or the reason for a refusal: nothing is skipped. How names are read is in
formats/, which parts make an entry in parts.py, and what an entry stands for in entries.py. Whether the entries fit a base
is decided in matching.py.

The scale of a low-rank entry is alpha / rank. Without an alpha it is 1, as in every other program. Files of diffusers and peft may
hold peft's settings in their metadata, or next to them, instead (peft_settings.py).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch

from sushi_research.adapters import bundled, peft_settings
from sushi_research.adapters import parts as of_module
from sushi_research.adapters.bundled import Tokens, place_of_token
from sushi_research.adapters.entries import Difference, Entry
from sushi_research.adapters.formats.names import COMPONENTS, component_of, place_of
from sushi_research.adapters.other_kinds import other_kind, without_entries
from sushi_research.adapters.parts import shown
from sushi_research.errors import UserError
from sushi_research.models import labels
from sushi_research.models.header import Header, read_header

# Modules of transformers (FLUX, Stable Diffusion 3 and others), whose adapters kohya's trainers name in the same way.
_TRANSFORMER = re.compile(
    r"(lora_unet_|lycoris_|unet\.|diffusion_model\.)"
    r"((double|single|joint)_blocks|(single_)?transformer_blocks|blocks|layers)[_.]\d"
)


@dataclass(frozen=True)
class Adapter:
    """The contents of an adapter file; `entries` is in the order of the modules' names, `notes` are sentences to tell the user.

    `tokens` are the new tokens that it has besides (bundled.py).
    """

    path: Path
    header: Header
    entries: tuple[Entry, ...]
    notes: tuple[str, ...] = ()
    tokens: Tokens = field(default_factory=dict)


def read_adapter(path: str | Path) -> Adapter:
    """Reads a file and checks it: first the header, then every value. UserError names the first defect, in sorted order."""
    from safetensors import safe_open

    header = read_header(Path(path))
    modules, of_tokens = _modules(header), _token_keys(header)
    settings = peft_settings.read(header)
    try:
        with safe_open(header.path, "pt") as file:
            keys = [key for parts in modules.values() for key in parts.values()]
            tensors = {key: file.get_tensor(key) for key in [*keys, *of_tokens]}
    except OSError as error:
        raise UserError(
            f"{header.path} cannot be read ({error.strerror or error}): check the disk and the permissions."
        ) from error
    for key in sorted(tensors):
        _require_finite(header.path, key, tensors[key])
    tokens: Tokens = {}
    for key, (token, encoder) in of_tokens.items():
        tokens.setdefault(token, {})[encoder] = tensors.pop(key)
    bundled.require_sound(header.path, tokens)
    entries = []
    for name, parts in modules.items():
        values = {part: tensors.pop(key) for part, key in parts.items()}
        alpha = values.pop("alpha", None)
        stored = None if alpha is None else float(alpha.double().reshape(()))
        entries.append(of_module.make(name, values, _scale(header, name, parts, settings, stored)))
    return Adapter(header.path, header, tuple(entries), _notes(header, modules, settings), tokens)


def is_adapter(path: Path) -> bool:
    """Whether a file's tensors are those of an adapter of any kind, readable here or not. UserError for a damaged file."""
    return any(place_of(key) or other_kind(key) for key in read_header(path).tensors)


def adapts_text(path: str | Path) -> bool:
    """Whether an adapter file also changes the text encoders or has new tokens, so that cached text embeddings cannot be used."""
    header = read_header(Path(path))
    return bool(_token_keys(header)) or any(component_of(name) != "unet" for name in _modules(header))


def _token_keys(header: Header) -> dict[str, tuple[str, str]]:
    """Key -> (token, text encoder) of the new tokens, in sorted order. UserError if two are the same."""
    found: dict[str, tuple[str, str]] = {}
    for key in sorted(header.tensors):
        if (place := place_of_token(key)) is None:
            continue
        if place in found.values():
            raise UserError(
                f"{header.path} holds {shown(key)} twice, in two spellings: take a copy that holds it once."
            )
        found[key] = place
    return found


def _modules(header: Header) -> dict[str, dict[str, str]]:
    """Module -> part -> the tensor's name, sorted by module; UserError unless all tensors are parts of sound entries."""
    path, keys = header.path, sorted(header.tensors)
    others = [key for key in keys if place_of_token(key) is None]
    keys = others or keys  # a file of new tokens alone is no adapter
    if not keys:
        raise UserError(f"{path} is empty (no tensors): download it again.")  # as inspection says it of a base
    for key in keys:
        if kind := other_kind(key):
            raise UserError(
                f"{path} holds {kind} ({shown(key)}), and LoRA, LoHa, LoKr, DoRA and differences of weights can be used here: give "
                "a file of one of these."
            )
    found = {key: place_of(key) for key in keys}
    if not any(found.values()):
        raise UserError(f"{path} is {without_entries(header)}, not a LoRA: give a LoRA file.")
    modules: dict[str, dict[str, str]] = {}
    for key, place in found.items():
        if place is None or component_of(place.module) is None:
            raise UserError(
                f"{path} holds {shown(key)}, which is not part of an adapter in a naming that is known here (module names that "
                f"begin with {', '.join(COMPONENTS)}): give a file in one of these."
            )
        if _TRANSFORMER.match(place.module):
            raise UserError(
                f"{path} holds {shown(key)}, which is no module of the UNet of {labels(' or of ')}: give an adapter for one of "
                "these."
            )
        parts = modules.setdefault(place.module, {})
        if place.part in parts:
            raise UserError(
                f"{path} holds {shown(parts[place.part])} and {shown(key)}, which are the same matrix of one module: "
                "take a copy that holds it once."
            )
        parts[place.part] = key
    for name in sorted(modules):
        of_module.require_sound(header, name, modules[name])
    return {name: modules[name] for name in sorted(modules)}


def _scale(
    header: Header,
    name: str,
    parts: dict[str, str],
    settings: peft_settings.Settings | None,
    stored: float | None,
) -> float:
    """The scale of a module by its alpha: `stored`, or that of peft's settings. UserError if the two differ,
    or for one that is zero or that float32 cannot hold."""
    path, kind = header.path, of_module.kind_of(parts)
    rank = of_module.rank_of({part: header.tensors[key].shape for part, key in parts.items()})
    if rank is None or kind is Difference:
        return 1.0
    alpha = None
    if settings:
        has_magnitude = "magnitude" in parts or "output_magnitude" in parts
        alpha = peft_settings.alpha_of(settings, path, name, rank, has_magnitude)
    if stored is not None and alpha is not None and not math.isclose(stored, alpha, rel_tol=1e-6):
        raise UserError(
            f"{path} gives {shown(name)} the alpha {stored:g} in a tensor and {alpha:g} in its metadata: "
            "take a copy in which they agree."
        )
    alpha = stored if stored is not None else alpha
    if alpha == 0:
        raise UserError(
            f"{path} gives {shown(name)} the alpha 0, which some programs read as no effect and others as a scale of 1: "
            "take a copy with another alpha."
        )
    if alpha is None:
        return 1.0
    if not torch.finfo(torch.float32).tiny <= abs(alpha / rank) <= torch.finfo(torch.float32).max / rank:
        raise UserError(
            f"{path} gives {shown(name)} the alpha {alpha:g}, which float32 cannot hold: take another copy of the adapter."
        )
    return alpha / rank


def _notes(
    header: Header, modules: dict[str, dict[str, str]], settings: peft_settings.Settings | None
) -> tuple[str, ...]:
    """What to tell the user of a file that says nothing about its scale."""
    silent = header.metadata.keys() <= {"format"} and settings is None
    shapes = [{part: header.tensors[key].shape for part, key in parts.items()} for parts in modules.values()]
    has_scale = any(of_module.rank_of(each) is not None for each in shapes)
    if silent and has_scale and not any("alpha" in parts for parts in modules.values()):
        return (
            f"{header.path} holds neither alphas nor metadata, so it is applied as it stands (alpha = rank), as other programs do; "
            "if it was trained with another alpha and saved without it, multiply the LoRA scale by alpha / rank",
        )
    return ()


def _require_finite(path: Path, key: str, tensor: torch.Tensor) -> None:
    # float8 has no isfinite of its own.
    values = tensor.float() if tensor.element_size() == 1 else tensor
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        what = "NaN" if torch.isnan(values).any() else "infinity"
        raise UserError(
            f"{path} holds {what} in {shown(key)} ({bad:,} of {values.numel():,} values are not finite): "
            "take another copy of the adapter, or one from earlier in its training."
        )
