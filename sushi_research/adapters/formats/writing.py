"""Writes what an adapter holds for each layer, in one of two layouts.

    kohya  lora_unet_<module_with_underscores>.lora_down.weight, .lora_up.weight, .lora_mid.weight, .alpha, .dora_scale; LyCORIS'
           names for its kinds and for biases (.hada_*, .lokr_*, .diff, .diff_b). SDXL's UNet has the names of Stability's blocks,
           SD1.5's those of diffusers; text encoders are lora_te_, or lora_te1_ and lora_te2_, with `text_model_`.
    peft   unet.<path>.lora_A.weight, .lora_B.weight, .lora_B.bias, .lora_magnitude_vector; text_encoder. and text_encoder_2. with
           `text_model.`

Scales. In kohya's layout, low-rank entries of one rank and one scale get an `.alpha` each. If they differ within a component,
alpha / rank goes into `up` and no alpha is written: diffusers gives modules whose alpha differs from the others a wrong scale, and
every program takes 1 where there is none. In peft's layout the scale is always in `up`, because only diffusers would look for an
alpha in the metadata.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import torch

from sushi_research.adapters.entries import Difference, Entry, Hadamard, Kronecker, LowRank, is_input_axis
from sushi_research.errors import UserError
from sushi_research.files import write_atomic
from sushi_research.models import ARCHITECTURES
from sushi_research.models.original_names import unet_name

Tensor = torch.Tensor
Layout = Literal["kohya", "peft"]
LAYOUTS: tuple[Layout, ...] = ("kohya", "peft")
# Component -> layer path -> entry.
Matches = Mapping[str, Mapping[str, Entry]]


def write_entries(
    path: Path,
    architecture: str,
    matches: Matches,
    *,
    layout: Layout,
    dtype: torch.dtype | None,
    metadata: Mapping[str, str],
    layers_per_block: int = 2,
    tokens: Mapping[str, Tensor] = MappingProxyType({}),
) -> None:
    """Writes an adapter file atomically; equal arguments give equal bytes.

    The tensors are cast to `dtype`, but for magnitudes of a DoRA, which are then fp32; with None all keep their own. The metadata
    gets the two hashes of the tensors, as in `kohya_format.save_adapter`. `layers_per_block` is that of the UNet's config. `tokens`
    are new tokens by key, as they are to be written (bundled.py).

    Raises UserError if the layout cannot hold an entry, a value overflows in `dtype`, or the file cannot be written.
    """
    import safetensors.torch

    tensors = tensors_of(architecture, matches, layout=layout, dtype=dtype, layers_per_block=layers_per_block)
    data = safetensors.torch.save(tensors | dict(tokens))
    start = 8 + int.from_bytes(data[:8], "little")
    digest = hashlib.sha256(memoryview(data)[start:]).hexdigest()
    hashes = {"sshs_model_hash": digest, "modelspec.hash_sha256": f"0x{digest}"}
    header = json.loads(data[8:start])
    write_atomic(path, header_bytes(header, {"format": "pt", **metadata, **hashes}) + data[start:])


def header_bytes(entries: Mapping[str, object], metadata: Mapping[str, str]) -> bytes:
    """The beginning of a safetensors file, up to the tensors: their entries, and the metadata in sorted order."""
    content = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    content |= {name: entry for name, entry in entries.items() if name != "__metadata__"}
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text


def tensors_of(
    architecture: str,
    matches: Matches,
    *,
    layout: Layout,
    dtype: torch.dtype | None = None,
    layers_per_block: int = 2,
) -> dict[str, Tensor]:
    """Name -> tensor on the CPU of everything in `matches`; UserError as for `write_entries`."""
    tensors: dict[str, Tensor] = {}
    for component, entries in matches.items():
        stems = names_of(architecture, component, list(entries), layout, layers_per_block)
        keeps_alpha = layout == "kohya" and has_one_scale(entries)
        for path, entry in entries.items():
            parts = _kohya(entry, keeps_alpha) if layout == "kohya" else _peft(entry)
            for part, tensor in parts.items():
                key = f"{stems[path]}.{part}"
                if part == "alpha":
                    _require_alpha(key, entry)
                    tensors[key] = tensor
                elif part in MAGNITUDES and dtype is not None:
                    tensors[key] = cast(tensor, torch.float32, key)
                else:
                    tensors[key] = cast(tensor, dtype or _own_dtype(entry, part, tensor), key)
    return tensors


def has_one_scale(entries: Mapping[str, Entry]) -> bool:
    """Whether the low-rank entries of a component have one rank and one scale, so that each can have an alpha in the file."""
    return len({(each.rank, each.scale) for each in entries.values() if isinstance(each, LowRank)}) < 2


def names_of(
    architecture: str, component: str, paths: list[str], layout: Layout, layers_per_block: int = 2
) -> dict[str, str]:
    """Layer path in a component -> the beginning of its tensors' names; one to one."""
    formats = ARCHITECTURES[architecture].formats()
    if component == "unet":
        stability = layout == "kohya" and formats.STABILITY_NAMES
        inner = {path: unet_name(path, layers_per_block=layers_per_block) if stability else path for path in paths}
        prefix = "lora_unet_"
    else:
        # transformers 5 has no `text_model` in the first encoder, and every program looks for it.
        inner = {
            path: path if path.startswith(("text_model.", "text_projection")) else f"text_model.{path}"
            for path in paths
        }
        number = "" if len(formats.TEXT_ENCODERS) == 1 else str(1 + formats.TEXT_ENCODERS.index(component))
        prefix = f"lora_te{number}_"
    if layout == "peft":
        names = {path: f"{component}.{name}" for path, name in inner.items()}
    else:
        names = {path: prefix + name.replace(".", "_") for path, name in inner.items()}
    assert len(set(names.values())) == len(names), "two layers have one name in the adapter file"
    return names


def without_mid(entry: LowRank) -> LowRank:
    """The entry with `mid` multiplied into `down`, which is the same change of the weight up to the rounding of `down`'s dtype."""
    if entry.mid is None:
        return entry
    down = torch.einsum("ijkl,jn->inkl", entry.mid.double(), entry.down.double().flatten(1))
    return replace(entry, down=down.to(entry.down.dtype), mid=None)


def _kohya(entry: Entry, keeps_alpha: bool) -> dict[str, Tensor]:
    """Part of the name -> tensor."""
    if isinstance(entry, Difference):
        return _present({"diff": entry.weight, "diff_b": entry.bias})
    scaled = {"dora_scale": _kohya_magnitude(entry) if isinstance(entry, LowRank) else entry.magnitude}
    if isinstance(entry, LowRank):
        up = entry.up if keeps_alpha else _times(entry.up, entry.scale)
        parts = {"lora_down.weight": entry.down, "lora_mid.weight": entry.mid, "lora_up.weight": up}
        alpha = _alpha(entry.alpha) if keeps_alpha else None
    elif isinstance(entry, Hadamard):
        parts = {f"hada_{part}": getattr(entry, part) for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")}
        alpha = _alpha(entry.scale * entry.rank)
    else:
        parts = {f"lokr_{part}": getattr(entry, part) for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")}
        if entry.rank is None:  # programs then take a scale of 1
            parts["lokr_w1"] = _times(entry.w1, entry.scale)
        alpha = None if entry.rank is None else _alpha(entry.scale * entry.rank)
    return _present({**parts, "alpha": alpha, **scaled, "diff_b": entry.bias})


def _peft(entry: Entry) -> dict[str, Tensor]:
    if not isinstance(entry, LowRank):
        is_norm = isinstance(entry, Difference) and (entry.weight is None or entry.weight.ndim < 2)
        advice = "write kohya's layout" + ("" if is_norm else ", or give a rank (--rank), which approximates it")
        raise UserError(f"{entry.name} is {kind_of(entry)}, and peft's layout holds only low-rank pairs: {advice}.")
    entry = without_mid(entry)
    magnitude = None
    if entry.magnitude is not None:
        if is_input_axis(entry, _weight_like(entry)):
            raise UserError(
                f"{entry.name} is a DoRA with a magnitude for each input, and peft's layout holds only one for each output: write "
                "kohya's layout, or give the base and a rank (--base, --rank), which approximates it."
            )
        magnitude = entry.magnitude.flatten()
        if entry.down.ndim > 2:  # peft's shape for convolutions
            magnitude = magnitude[None, :, None, None]
    up = _times(entry.up, entry.scale)
    parts = {"lora_A.weight": entry.down, "lora_B.weight": up, "lora_B.bias": entry.bias}
    return _present({**parts, "lora_magnitude_vector": magnitude})


def kind_of(entry: Entry) -> str:
    """What an entry is, with its article, for messages."""
    if isinstance(entry, Difference):
        return "a full difference of weights"
    name = {LowRank: "LoRA", Hadamard: "LoHa", Kronecker: "LoKr"}[type(entry)]
    if entry.magnitude is not None:
        return "a DoRA" if isinstance(entry, LowRank) else f"a {name} with DoRA"
    return (
        f"a {name} with Tucker decomposition" if isinstance(entry, LowRank) and entry.mid is not None else f"a {name}"
    )


def _kohya_magnitude(entry: LowRank) -> Tensor | None:
    """The magnitude in LyCORIS' shape: [out, 1, ...] or [1, in, ...], with as many dimensions as the weight."""
    if entry.magnitude is None:
        return None
    like = _weight_like(entry)
    values, ones = entry.magnitude.flatten(), (1,) * (like.ndim - 2)
    return values.reshape(1, -1, *ones) if is_input_axis(entry, like) else values.reshape(-1, 1, *ones)


def _weight_like(entry: LowRank) -> Tensor:
    """A tensor without values of the shape of the layer's weight."""
    kernel = (entry.down if entry.mid is None else entry.mid).shape[2:]
    return torch.empty(entry.up.shape[0], entry.down.shape[1], *kernel, device="meta")


def _present(parts: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    return {part: tensor for part, tensor in parts.items() if tensor is not None}


def _times(tensor: Tensor, scale: float) -> Tensor:
    """fp32, or the tensor itself for a scale of 1."""
    return tensor if scale == 1 else (tensor.double() * scale).float()


def _alpha(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)


def _require_alpha(key: str, entry: Entry) -> None:
    """UserError for an alpha that reading.py refuses."""
    value, range_ = entry.scale * entry.rank, torch.finfo(torch.float32)
    if not range_.tiny <= abs(entry.scale) <= range_.max / entry.rank:
        raise UserError(f"{key} would be {value:.3g}, which float32 cannot hold: give weights nearer to 1 (--weights).")


# A magnitude multiplies the base's weight: its rounding is as large as one of the base, and in bf16 a tenth of what an adapter
# changes.
MAGNITUDES = ("dora_scale", "lora_magnitude_vector")
# Parts that a scale may be multiplied into -> the matrix that they are of.
_SCALED = {"lora_up.weight": "up", "lora_B.weight": "up", "lokr_w1": "w1"}


def _own_dtype(entry: Entry, part: str, tensor: Tensor) -> torch.dtype:
    """The dtype of a part in the file that the entry is of: matrices, magnitudes and biases of one entry may have several."""
    return getattr(entry, _SCALED[part]).dtype if part in _SCALED else tensor.dtype


def cast(tensor: Tensor, dtype: torch.dtype, key: str) -> Tensor:
    """A copy on the CPU in `dtype`; UserError if a value overflows."""
    cast = tensor.detach().to("cpu", dtype).contiguous()
    if not torch.isfinite(cast.float()).all():
        is_narrow = torch.finfo(dtype).max < torch.finfo(torch.bfloat16).max
        raise UserError(
            f"{key} has values up to {tensor.double().abs().max():.3g}, which {str(dtype).removeprefix('torch.')} cannot hold: "
            + ("write bf16 or fp32 (--dtype)." if is_narrow else "give smaller weights, or other adapters.")
        )
    return cast.clone() if cast.data_ptr() == tensor.data_ptr() else cast
