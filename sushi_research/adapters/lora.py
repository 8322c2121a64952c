"""LoRA adapter: a pair of low-rank matrices next to each chosen layer of the frozen UNet (arXiv 2106.09685).

    y = W x + (alpha / rank) * B A x,    A: [rank, in] starts random, B: [out, rank] starts at zero

A module's path is its path in the UNet without the adapter, for example `mid_block.attentions.0.proj_in`. Its two tensors are
`<path>.lora_A.weight` and `<path>.lora_B.weight`.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import nn

from sushi_research import randomness
from sushi_research.adapters.entries import LowRank
from sushi_research.errors import UserError, nearest

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

ADAPTER = "default"
# The parts of the UNet that adapter files can name; conv_in, conv_out and the embeddings are not among them.
BLOCKS = ("down_blocks.", "mid_block.", "up_blocks.")

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")
PROJECTIONS = ("proj_in", "proj_out")
CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv")
PRESETS: dict[str, tuple[str, ...]] = {
    "attention": ATTENTION,
    "attention_ff": ATTENTION + FEED_FORWARD,
    "kohya": ATTENTION + FEED_FORWARD + PROJECTIONS,
    "kohya_conv": ATTENTION + FEED_FORWARD + PROJECTIONS + CONVOLUTIONS,
}


def resolve_targets(targets: str | Sequence[str]) -> list[str]:
    """The module path suffixes to adapt: those of a preset, or the given list. UserError for an unknown preset."""
    if not isinstance(targets, str):
        return list(targets)
    if targets not in PRESETS:
        raise UserError(
            f"{targets} is not a preset of adapter targets{nearest(targets, PRESETS)}: choose from "
            f"{', '.join(PRESETS)}, or give a list of module names."
        )
    return list(PRESETS[targets])


def attach(
    unet: nn.Module,
    *,
    targets: str | Sequence[str],
    rank: int,
    alpha: float,
    dropout: float,
    init: Literal["default", "gaussian"],
    seed: int,
    start: Mapping[str, LowRank] | None = None,
) -> None:
    """Freezes the UNet and adds the trainable adapter: fp32 matrices on the device of their layer.

    The layers are peft's, added by diffusers' `add_adapter`. A is initialised with peft's distributions (`default`: uniform in
    +-1/sqrt(fan in), which is kaiming_uniform with a = sqrt(5); `gaussian`: normal with standard deviation 1/rank), but depends
    only on the seed and the module's path. `start` are the pairs to begin with, by module, each with its own rank and alpha, in
    place of initial values. UserError for a target that matches no layer, or one that cannot have an adapter.
    """
    from peft import LoraConfig

    endings = resolve_targets(targets)
    _require_layers(unet, endings)
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=endings)
    pairs = start or {}
    config.rank_pattern |= _patterns({path: pair.rank for path, pair in pairs.items() if pair.rank != rank})
    config.alpha_pattern |= _patterns({path: pair.alpha for path, pair in pairs.items() if pair.alpha != alpha})
    # peft freezes all other parameters. It also initialises A from the global generator: those values are replaced below, and
    # the generator's state is restored.
    with torch.random.fork_rng(devices=[]):
        unet.add_adapter(config, adapter_name=ADAPTER)
    modules = adapter_modules(unet)
    assert start is None or modules.keys() == start.keys(), "the targets are not the modules of the file"
    for path, layer in modules.items():
        device = layer.get_base_layer().weight.device
        if device.type == "meta":
            continue  # a model without numbers has no initial values
        down, up = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
        # On a bf16 UNet peft creates bf16 matrices; the initial values must be fp32.
        if start is None:
            first, second = initial_down(seed, path, tuple(down.weight.shape), init), torch.zeros(up.weight.shape)
        else:
            first, second = start[path].down.float(), start[path].up.float()
        down.weight, up.weight = nn.Parameter(first.to(device)), nn.Parameter(second.to(device))


def _patterns(values: Mapping[str, Any]) -> dict[str, Any]:
    """The value of each module path, as patterns for peft: one for each value, because peft tries all patterns for each module."""
    paths: dict[Any, list[str]] = {}
    for path, value in values.items():
        paths.setdefault(value, []).append(re.escape(path))
    return {f"^(?:{'|'.join(group)})": value for value, group in paths.items()}


def initial_down(seed: int, path: str, shape: tuple[int, ...], init: str) -> torch.Tensor:
    """The initial A of one module, fp32; `shape` is [rank, in] or, for a convolution, [rank, in, k, k]."""
    assert init in ("default", "gaussian"), init
    generator = randomness.key(seed, "adapter-init", path)
    if init == "gaussian":
        values = generator.standard_normal(shape, dtype=np.float32) / np.float32(shape[0])
    else:
        bound = np.float32(1 / math.sqrt(math.prod(shape[1:])))
        values = (2 * generator.random(shape, dtype=np.float32) - 1) * bound
    return torch.from_numpy(values)


def adapter_modules(unet: nn.Module) -> dict[str, LoraLayer]:
    """Path -> layer with an adapter, in the order of the UNet's modules."""
    from peft.tuners.lora import LoraLayer

    return {path: module for path, module in unet.named_modules() if isinstance(module, LoraLayer)}


def adapter_parameters(unet: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's tensors by name, in the order of the UNet's modules, A before B."""
    parameters = {}
    for path, layer in adapter_modules(unet).items():
        parameters[f"{path}.lora_A.weight"] = layer.lora_A[ADAPTER].weight
        parameters[f"{path}.lora_B.weight"] = layer.lora_B[ADAPTER].weight
    return parameters


@contextlib.contextmanager
def without_adapter(unet: nn.Module) -> Iterator[None]:
    """Context in which the UNet is the base, bit for bit. On exit the adapter is active again, with its gradients kept."""
    if not adapter_modules(unet):
        yield
        return
    unet.disable_adapters()
    try:
        yield
    finally:
        unet.enable_adapters()


def count_parameters(unet: nn.Module) -> int:
    """Number of parameters of the adapter. Works on the meta device too."""
    return sum(parameter.numel() for parameter in adapter_parameters(unet).values())


def is_zero(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> bool:
    """Whether every B is zero in `dtype`, so that the adapter changes nothing. `tensors` are as `adapter_parameters` names them."""
    return not any(tensor.to(dtype).any() for name, tensor in tensors.items() if name.endswith(".lora_B.weight"))


def adaptable_paths(unet: nn.Module) -> list[str]:
    """Paths of the layers that can have an adapter, in a UNet without one: all layers of the preset `kohya_conv`."""
    return [
        path
        for path, module in unet.named_modules()
        if path.startswith(BLOCKS) and isinstance(module, nn.Linear | nn.Conv2d)
    ]


def matching(endings: Sequence[str], paths: Sequence[str]) -> set[str]:
    """Those of the paths that one of the endings names, as peft matches them."""
    return {path for path in paths if any(path == ending or path.endswith(f".{ending}") for ending in endings)}


def _require_layers(unet: nn.Module, endings: Sequence[str]) -> None:
    """UserError if a suffix matches no module, or one that cannot have an adapter. Matches as peft does."""
    adaptable = set(adaptable_paths(unet))
    paths = [path for path, _ in unet.named_modules()]
    for ending in endings:
        matches = matching([ending], paths)
        if not matches:
            raise UserError(
                f"the adapter target {ending} fits no module of the UNet"
                f"{nearest(ending, PRESETS['kohya_conv'])}: correct or remove it."
            )
        for path in paths:
            if path in matches and path not in adaptable:
                raise UserError(
                    f"the adapter target {ending} fits {path}, which cannot have an adapter: choose from "
                    f"{', '.join(PRESETS['kohya_conv'])}, or endings that name fewer modules."
                )
