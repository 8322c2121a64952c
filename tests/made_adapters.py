"""Adapter files of every kind with random numbers for given layers, written without the suite's own writers."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping

import narrow_models
import torch
from other_readers import Layer, stability_names

from sushi_research.adapters import entries

# A conv of the kind "tucker" is decomposed by way of a core; the others are of the kinds.
KINDS = ("lora", "tucker", "dora", "loha", "loha tucker", "lokr", "lokr whole", "lokr tucker", "full")
# "dora outputs" has the magnitudes of peft, which other programs apply in another way; "lora mixed" two ranks and scales.
RANK, ALPHA = 2, 1.0


def made(
    kind: str, weights: Mapping[Layer, torch.Tensor], layers: Iterable[Layer], seed: int = 0
) -> dict[Layer, entries.Entry]:
    """Layer -> an entry of this kind; a change of the size of the weight, so that a wrong norm shows."""
    generator = torch.Generator().manual_seed(seed)
    found = {layer: _entry(kind, weights[layer], generator) for layer in layers}
    for (component, path), entry in found.items():
        # The UNet's queries, keys and values have no bias.
        if isinstance(entry, entries.Difference) and component == "unet" and re.search(r"\.to_[qkv]$", path):
            found[component, path] = dataclasses.replace(entry, bias=None)
    return found


def _entry(kind: str, weight: torch.Tensor, generator: torch.Generator) -> entries.Entry:
    def number(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device="meta") if weight.is_meta else torch.randn(shape, generator=generator) / 4

    out, into, *kernel = weight.shape if weight.dim() > 1 else (*weight.shape, 1)
    scale, ones = ALPHA / RANK, [1] * len(kernel)
    is_wide = bool(kernel) and kernel[0] > 1
    if kind == "full" or weight.dim() == 1:
        return entries.Difference("", number(*weight.shape), number(out))
    if kind == "tucker" and is_wide:
        return entries.LowRank(
            "", number(RANK, into, 1, 1), number(out, RANK, 1, 1), scale, mid=number(RANK, RANK, *kernel)
        )
    if kind.startswith("loha"):
        if kind == "loha tucker" and is_wide:
            core = [number(RANK, RANK, *kernel) for _ in range(2)]
            sides = number(RANK, out), number(RANK, into), number(RANK, out), number(RANK, into)
            return entries.Hadamard("", *sides, scale, *core)
        flat = weight[0].numel()
        return entries.Hadamard("", number(out, RANK), number(RANK, flat), number(out, RANK), number(RANK, flat), scale)
    if kind.startswith("lokr"):
        a, b = (2 if size % 2 == 0 else 1 for size in (out, into))
        c, d = out // a, into // b
        if kind == "lokr whole":  # without a rank the programs take 1 for the scale
            return entries.Kronecker("", w1=number(a, b), w2=number(c, d, *kernel), scale=1.0)
        if kind == "lokr tucker" and is_wide:
            parts = {"w2_a": number(RANK, c), "w2_b": number(RANK, d), "t2": number(RANK, RANK, *kernel)}
        else:
            parts = {"w2_a": number(c, RANK), "w2_b": number(RANK, d * weight[0, 0].numel())}
        return entries.Kronecker("", w1=number(a, b), **parts, scale=scale)
    is_other = kind == "lora mixed" and (is_wide or out > into)
    rank, scale = (RANK + 1, ALPHA) if is_other else (RANK, scale)
    pair = entries.LowRank("", number(rank, into, *kernel), number(out, rank, *ones), scale)
    if not kind.startswith("dora"):
        return pair
    norms = entries.norms(weight, of_inputs=kind == "dora")
    return entries.LowRank(pair.name, pair.down, pair.up, scale, magnitude=norms * (1 + number(*norms.shape)))


def in_kohyas_names(
    architecture: str, made: Mapping[Layer, entries.Entry], *, stability: bool | None = None
) -> dict[str, torch.Tensor]:
    """The tensors of a file in kohya's and LyCORIS's names."""
    names = kohyas_names(architecture, made, stability=stability)
    return {f"{names[layer]}.{part}": tensor for layer, entry in made.items() for part, tensor in parts(entry).items()}


def kohyas_names(architecture: str, layers: Iterable[Layer], *, stability: bool | None = None) -> dict[Layer, str]:
    """Layer -> its name in kohya's files; the UNet in Stability's block names for SDXL unless said."""
    stability = architecture == "sdxl" if stability is None else stability
    prefixes = {"text_encoder": "lora_te_" if architecture == "sd15" else "lora_te1_", "text_encoder_2": "lora_te2_"}
    names: dict[Layer, str] = {}
    for layer in layers:
        component, path = layer
        flat = path.replace(".", "_")
        if component == "unet":
            names[layer] = "lora_unet_" + (
                _stability_names(architecture)[path].replace(".", "_") if stability else flat
            )
        else:
            names[layer] = prefixes[component] + (flat if path == "text_projection" else f"text_model_{flat}")
    return names


@functools.cache
def _stability_names(architecture: str) -> dict[str, str]:
    return stability_names(path for component, path in narrow_models.weights(architecture) if component == "unet")


def parts(entry: entries.Entry) -> dict[str, torch.Tensor]:
    """The tensors of one module by the ends of their keys."""
    if isinstance(entry, entries.Difference):
        is_norm = entry.weight is not None and entry.weight.dim() == 1
        found = (
            {"w_norm": entry.weight, "b_norm": entry.bias} if is_norm else {"diff": entry.weight, "diff_b": entry.bias}
        )
    elif isinstance(entry, entries.LowRank):
        found = {"lora_down.weight": entry.down, "lora_up.weight": entry.up, "lora_mid.weight": entry.mid}
        found["alpha"] = torch.tensor(entry.scale * entry.rank)
    elif isinstance(entry, entries.Hadamard):
        found = {f"hada_{part}": getattr(entry, part) for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")}
        found["alpha"] = torch.tensor(entry.scale * entry.rank)
    else:
        found = {f"lokr_{part}": getattr(entry, part) for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")}
        found["alpha"] = torch.tensor(entry.scale * (entry.rank or 1))
    found["dora_scale"] = getattr(entry, "magnitude", None)
    return {part: tensor for part, tensor in found.items() if tensor is not None}
