"""Small adapter files of every kind and naming, and their reading: each is read, described and matched with a UNet."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Layers of a UNet as `_unet` has it: path -> shape of the weight.
LAYERS = {
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": (8, 8),
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0": (8, 8),
    "down_blocks.1.resnets.0.conv1": (8, 8, 3, 3),
    "mid_block.resnets.0.norm1": (8,),
    "conv_in": (8, 4, 3, 3),
}
# Kind -> its tensors for a layer of [out, in, ...], as shapes by the end of the name.
RANK = 2
Shapes = dict[str, tuple[int, ...]]


def _pair(shape: tuple[int, ...]) -> Shapes:
    out, into, *kernel = shape
    return {"down": (RANK, into, *kernel), "up": (out, RANK, *[1] * len(kernel))}


def _hadamard(shape: tuple[int, ...]) -> Shapes:
    flat = functools.reduce(int.__mul__, shape[1:])
    return {f"hada_w{n}_{side}": (shape[0], RANK) if side == "a" else (RANK, flat) for n in (1, 2) for side in "ab"}


def _kronecker(shape: tuple[int, ...]) -> Shapes:
    flat = functools.reduce(int.__mul__, shape[1:]) // 2
    return {"lokr_w1": (2, 2), "lokr_w2_a": (shape[0] // 2, RANK), "lokr_w2_b": (RANK, flat)}


def make_adapters(folder: Path) -> None:
    """One file for each kind and for each naming; all are accepted."""
    import numpy
    from safetensors.numpy import save_file

    random = numpy.random.default_rng(0)

    def values(shape: tuple[int, ...]) -> Any:
        return random.standard_normal(shape, dtype=numpy.float32)

    def write(name: str, shapes: Mapping[str, tuple[int, ...]], metadata: dict[str, str] | None = None) -> None:
        save_file({key: values(shape) for key, shape in shapes.items()}, folder / f"{name}.safetensors", metadata)

    wide = {path: shape for path, shape in LAYERS.items() if len(shape) > 1}
    kohya = {path: "lora_unet_" + path.replace(".", "_") for path in LAYERS}
    ends = {"down": "lora_down.weight", "up": "lora_up.weight"}
    pairs = {f"{kohya[path]}.{ends[part]}": size for path, shape in wide.items() for part, size in _pair(shape).items()}
    alphas = {f"{kohya[path]}.alpha": () for path in wide}
    write("kohya", pairs | alphas, {"ss_network_dim": "2", "ss_network_args": '{"conv_dim": "2"}'})
    write(
        "dora",
        pairs
        | {f"{kohya[path]}.dora_scale": (1, *shape[1:2], *[1] * (len(shape) - 2)) for path, shape in wide.items()},
    )
    write(
        "loha",
        {f"{kohya[path]}.{part}": size for path, shape in wide.items() for part, size in _hadamard(shape).items()}
        | alphas,
    )
    write(
        "lokr",
        {f"{kohya[path]}.{part}": size for path, shape in wide.items() for part, size in _kronecker(shape).items()}
        | alphas,
    )
    write(
        "full",
        {f"{kohya[path]}.diff": shape for path, shape in wide.items()}
        | {f"{kohya[path]}.diff_b": shape[:1] for path, shape in wide.items()},
    )
    ends = {"down": "lora_A.weight", "up": "lora_B.weight"}
    peft = {f"unet.{path}.{ends[part]}": size for path, shape in wide.items() for part, size in _pair(shape).items()}
    settings = {f"unet.{key}": value for key, value in {"r": RANK, "lora_alpha": 1.0, "peft_type": "LORA"}.items()}
    write("peft", peft, {"lora_adapter_metadata": json.dumps(settings)})
    old = [path for path in wide if ".attn1." in path]
    names = {path: path.replace(".to_out.0", ".to_out").replace(".to_", ".processor.to_") for path in old}
    write(
        "old",
        {f"unet.{names[path]}_lora.{part}.weight": size for path in old for part, size in _pair(wide[path]).items()},
    )
    read_adapter_file(folder, "kohya.safetensors")  # what is loaded once does not count for an input


def read_adapter_file(folder: Path, name: str) -> object:
    """Reads a file as every command does, first without a base. Nothing may be written, and what is read is finite."""
    import torch

    from sushi_research.adapters.description import describe
    from sushi_research.adapters.entries import delta
    from sushi_research.adapters.matching import match_components
    from sushi_research.adapters.reading import read_adapter
    from sushi_research.models import ARCHITECTURES

    before = sorted(path.name for path in folder.iterdir())
    try:
        adapter = read_adapter(folder / name)
        list(describe(folder / name))
        matches = match_components(adapter, ARCHITECTURES["sd15"], {"unet": _unet()})
    finally:
        assert sorted(path.name for path in folder.iterdir()) == before, "something was written"
    for path, entry in matches["unet"].items():
        change = delta(entry, tuple(LAYERS[path]))
        assert change.shape == LAYERS[path] and change.dtype == torch.float32
    return matches


@functools.cache
def _unet() -> Any:
    """A module with the layers, and what is asked of a UNet's config."""
    import torch

    root = torch.nn.Module()
    for path, shape in LAYERS.items():
        *places, last = path.split(".")
        module = root
        for place in places:
            if not hasattr(module, place):
                module.add_module(place, torch.nn.Module())
            module = getattr(module, place)
        module.add_module(last, _layer(shape))
    root.config = type("Config", (), {"layers_per_block": 2})()
    return root


def _layer(shape: tuple[int, ...]) -> Any:
    import torch

    if len(shape) == 1:
        return torch.nn.GroupNorm(1, shape[0])
    if len(shape) == 2:
        return torch.nn.Linear(shape[1], shape[0])
    return torch.nn.Conv2d(shape[1], shape[0], shape[2:])
