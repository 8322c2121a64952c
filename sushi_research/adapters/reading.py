"""Reads an adapter file of any trainer as low-rank pairs with their alphas, or refuses it with one sentence that names the cause.

Every tensor of a file is either part of a pair or the reason for a refusal: nothing is skipped. Whether the pairs fit a base is
decided in matching.py. Pairs are known by three naming schemes:

    kohya      lora_unet_<module_with_underscores>.lora_down.weight, .lora_up.weight, .alpha; lora_te_, lora_te1_, lora_te2_
    peft       unet.<module>.lora_A.weight, .lora_B.weight; text_encoder., text_encoder_2.
    diffusers  unet.<module>.lora.down.weight, .lora.up.weight, and two older spellings of the same

A pair adds (alpha / rank) * up @ down to its layer. Without an alpha the scale is 1, as in every other program. diffusers' own
files may hold peft's settings in their metadata instead (peft_settings.py).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from sushi_research.adapters import peft_settings
from sushi_research.adapters.other_kinds import other_kind, without_pairs
from sushi_research.errors import UserError
from sushi_research.models import labels
from sushi_research.models.header import Header, Tensor, read_header

# How a module's name begins -> the component of the pipeline that it belongs to.
COMPONENTS = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "unet.": "unet",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
}
_PARTS = {
    "down": ("lora_down.weight", "lora_A.weight", "lora.down.weight", "lora_linear_layer.down.weight"),
    "up": ("lora_up.weight", "lora_B.weight", "lora.up.weight", "lora_linear_layer.up.weight"),
    "alpha": ("alpha",),
}
_ENDS = {f".{ending}": part for part, endings in _PARTS.items() for ending in endings}
# diffusers' spelling from before it used peft: `attn1.processor.to_q_lora.down.weight`, and in text encoders
# `self_attn.to_q_lora.down.weight` for `self_attn.q_proj`.
_OLD = re.compile(r"\.to_(q|k|v|out)_lora\.(down|up)\.weight$")
# Modules of transformers (FLUX, Stable Diffusion 3 and others), whose adapters kohya's trainers name in the same way.
_TRANSFORMER = re.compile(
    r"(lora_unet_|unet\.)((double|single|joint)_blocks|(single_)?transformer_blocks|blocks|layers)[_.]\d"
)

FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
INTEGERS = ("I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64")


@dataclass(frozen=True)
class Pair:
    """The matrices of one module in the file's dtype: `down` [rank, in] and `up` [out, rank], or for a convolution
    [rank, in, k, k] and [out, rank, 1, 1]. `name` is the module's name in the file."""

    name: str
    down: torch.Tensor
    up: torch.Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """The number of rows of `down`."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """The factor of `up @ down`."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class Adapter:
    """The contents of an adapter file; `pairs` is in the order of the modules' names."""

    path: Path
    header: Header
    pairs: tuple[Pair, ...]


def read_adapter(path: str | Path) -> Adapter:
    """Reads a file and checks it: first the header, then every value. UserError names the first defect, in sorted order."""
    from safetensors import safe_open

    header = read_header(Path(path))
    modules = _modules(header)
    settings = peft_settings.read(header)
    try:
        with safe_open(header.path, "pt") as file:
            tensors = {key: file.get_tensor(key) for parts in modules.values() for key in parts.values()}
    except OSError as error:
        raise UserError(
            f"{header.path} cannot be read ({error.strerror or error}): check the disk and the permissions."
        ) from error
    for key in sorted(tensors):
        _require_finite(header.path, key, tensors[key])
    pairs = []
    for name, parts in modules.items():
        down, up = tensors[parts["down"]], tensors[parts["up"]]
        alpha = float(tensors[parts["alpha"]].double().reshape(())) if "alpha" in parts else None
        pairs.append(Pair(name, down, up, _alpha(header.path, name, down.shape[0], alpha, settings)))
    return Adapter(header.path, header, tuple(pairs))


def is_adapter(path: Path) -> bool:
    """Whether a file's tensors are those of an adapter of any kind, readable here or not. UserError for a damaged file."""
    return any(_part(key) or other_kind(key) for key in read_header(path).tensors)


def component_of(name: str) -> str | None:
    """The component of the pipeline that a module's name in a file belongs to; None if the name begins like no other."""
    return next((component for prefix, component in COMPONENTS.items() if name.startswith(prefix)), None)


def adapts_text(path: str | Path) -> bool:
    """Whether an adapter file also changes the text encoders, so that cached text embeddings cannot be used."""
    return any(component_of(name) != "unet" for name in _modules(read_header(Path(path))))


def _part(key: str) -> tuple[str, str] | None:
    """(name of the module, "down", "up" or "alpha") of a tensor's name; None if it is no part of a pair."""
    key = key.replace(".processor.", ".")
    if old := _OLD.search(key):
        layer = f"{old[1]}_proj" if key.startswith("text_") else f"to_{old[1]}" + (".0" if old[1] == "out" else "")
        return f"{key[: old.start()]}.{layer}", old[2]
    ending = next((ending for ending in _ENDS if key.endswith(ending)), None)
    return (key.removesuffix(ending), _ENDS[ending]) if ending else None


def _modules(header: Header) -> dict[str, dict[str, str]]:
    """Module -> part -> the tensor's name, sorted by module; UserError unless all tensors are complete pairs of real numbers."""
    path, keys = header.path, sorted(header.tensors)
    if not keys:
        raise UserError(f"{path} is empty (no tensors): download it again.")  # as inspection says it of a base
    for key in keys:
        if kind := other_kind(key):
            raise UserError(
                f"{path} holds {kind} ({_shown(key)}), and only low-rank pairs (LoRA) can be used here: give a LoRA file."
            )
    found = {key: _part(key) for key in keys}
    if not any(found.values()):
        raise UserError(f"{path} is {without_pairs(header)}, not a LoRA: give a LoRA file.")
    modules: dict[str, dict[str, str]] = {}
    for key, part in found.items():
        if part is None or component_of(part[0]) is None:
            raise UserError(
                f"{path} holds {_shown(key)}, which is not part of a low-rank pair in kohya's, peft's or diffusers' naming "
                f"(module names that begin with {', '.join(COMPONENTS)}): give a file in one of these."
            )
        if _TRANSFORMER.match(part[0]):
            raise UserError(
                f"{path} holds {_shown(key)}, which is no module of the UNet of {labels(' or of ')}: give an adapter for one of "
                "these."
            )
        parts = modules.setdefault(part[0], {})
        if part[1] in parts:
            raise UserError(
                f"{path} holds {_shown(parts[part[1]])} and {_shown(key)}, which are the same matrix of one module: "
                "take a copy that holds it once."
            )
        parts[part[1]] = key
    for name in sorted(modules):
        _require_pair(header, name, modules[name])
    return {name: modules[name] for name in sorted(modules)}


def _require_pair(header: Header, name: str, parts: dict[str, str]) -> None:
    """UserError unless the module has two matrices whose shapes fit together, of real numbers, and at most one number as alpha."""
    missing = next((part for part in ("down", "up") if part not in parts), None)
    if missing:
        raise UserError(
            f"{header.path} holds {_shown(min(parts.values()))} without the {missing} matrix of that module: "
            "take a complete copy."
        )
    for part, key in parts.items():
        dtype = header.tensors[key].dtype
        if dtype not in (FLOATS + INTEGERS if part == "alpha" else FLOATS):
            wanted = "an alpha is a real number" if part == "alpha" else f"matrices are read in {', '.join(FLOATS)}"
            raise UserError(
                f"{header.path} holds {_shown(key)} in {dtype}, and {wanted}: take another copy of the adapter."
            )
    down, up = (header.tensors[parts[part]].shape for part in ("down", "up"))
    shapes = f"[{_sizes(down)}] and [{_sizes(up)}]"
    if len(down) not in (2, 4) or len(up) != len(down) or up[2:] not in ((), (1, 1)) or 0 in (*down, *up):
        raise UserError(
            f"{header.path}: the matrices of {_shown(name)} have the shapes {shapes}, which are not those of a LoRA of a linear "
            "or convolutional layer: take another copy of the adapter."
        )
    if down[0] != up[1]:
        raise UserError(
            f"{header.path}: the matrices of {_shown(name)} have the shapes {shapes}, so the rank is {down[0]} in one and "
            f"{up[1]} in the other: take another copy of the adapter."
        )
    if "alpha" in parts and _count(header.tensors[parts["alpha"]]) != 1:
        raise UserError(
            f"{header.path} holds {_shown(parts['alpha'])} with {_count(header.tensors[parts['alpha']])} values, and an alpha "
            "is one number: take another copy of the adapter."
        )


def _alpha(path: Path, name: str, rank: int, stored: float | None, settings: peft_settings.Settings | None) -> float:
    """The alpha of a module: the file's, or peft's settings, or the rank. UserError if two differ, or for zero."""
    alpha = peft_settings.alpha_of(settings, path, name, rank) if settings else None
    if stored is not None and alpha is not None and not math.isclose(stored, alpha, rel_tol=1e-6):
        raise UserError(
            f"{path} gives {_shown(name)} the alpha {stored:g} in a tensor and {alpha:g} in its metadata: "
            "take a copy in which they agree."
        )
    alpha = stored if stored is not None else alpha
    if alpha == 0:
        raise UserError(
            f"{path} gives {_shown(name)} the alpha 0, which some programs read as no effect and others as a scale of 1: "
            "take a copy with another alpha."
        )
    return float(rank) if alpha is None else alpha


def _require_finite(path: Path, key: str, tensor: torch.Tensor) -> None:
    # float8 has no isfinite of its own.
    values = tensor.float() if tensor.element_size() == 1 else tensor
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        what = "NaN" if torch.isnan(values).any() else "infinity"
        raise UserError(
            f"{path} holds {what} in {_shown(key)} ({bad:,} of {values.numel():,} values are not finite): "
            "take another copy of the adapter, or one from earlier in its training."
        )


def _count(tensor: Tensor) -> int:
    return math.prod(tensor.shape)


def _sizes(shape: tuple[int, ...]) -> str:
    return ", ".join(str(size) for size in shape)


def _shown(key: str) -> str:
    """A tensor's name in a message; names from a file can be empty or long."""
    return key if 0 < len(key) <= 200 else repr(key[:200])
