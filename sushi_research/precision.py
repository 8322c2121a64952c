"""The dtype of every tensor of a training step.

The frozen UNet and its activations have the compute dtype. With model.base_storage, most of the UNet's weights are held in fewer
bits and restored in the compute dtype for each use (models/storage.py). The adapter exists twice: as fp32 master weights, which the
optimizer updates, and as a working copy in the compute dtype, which the UNet uses and which is refreshed once per step.
Gradients of micro-batches are summed in fp32, and the loss is computed in fp32. A bf16 adapter without master weights would
never change many entries of A: an Adam step at lr 1e-4 is less than half the spacing of bf16 numbers of that size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from sushi_research.errors import UserError

COMPUTE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class ResolvedPrecision(NamedTuple):
    """ "bf16", "fp16" or "fp32", and why it is that one."""

    name: str
    reason: str


def resolve_precision(configured: str, launcher: str | None, device: torch.device) -> ResolvedPrecision:
    """The precision of a command, and why.

    `launcher` is the environment variable ACCELERATE_MIXED_PRECISION. Its bf16 and fp16 take precedence. `no` is also the
    launcher's default, so then `configured` decides (bf16, fp16, fp32 or auto). auto is bf16 on a GPU that supports it, fp16
    on an older GPU, fp32 on a CPU. UserError for the launcher's fp8.
    """
    if launcher not in (None, "no", "bf16", "fp16"):
        raise UserError(
            f"the launcher's mixed precision is {launcher}, which this suite does not support: "
            "launch with --mixed_precision bf16, fp16 or no."
        )
    if launcher in ("bf16", "fp16"):
        return ResolvedPrecision(launcher, f"the launcher's --mixed_precision {launcher}")
    if configured != "auto":
        return ResolvedPrecision(configured, f"the config says {configured}")
    if device.type != "cuda":
        return ResolvedPrecision("fp32", "auto, and this is a CPU")
    # GPUs before Ampere only emulate bf16, which is slower than it is worth.
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return ResolvedPrecision("bf16", "auto, and this GPU has bf16")
    return ResolvedPrecision("fp16", "auto, and this GPU has no bf16 of its own")


@dataclass(frozen=True)
class DtypePolicy:
    """The dtype of every tensor of a training step. `optimizer_state` is text, because an optimizer may mix dtypes.

    `storage` is model.base_storage: how the layers of the UNet's blocks are held.
    """

    weights: torch.dtype
    activations: torch.dtype
    adapter: torch.dtype
    master_weights: torch.dtype
    gradients: torch.dtype
    optimizer_state: str
    loss: torch.dtype
    vae: torch.dtype
    text_encoder: torch.dtype
    storage: str = "compute"

    def describe(self) -> dict[str, str]:
        """Description -> dtype, as the plan prints them."""
        names = {
            "frozen UNet weights": self.weights,
            "activations": self.activations,
            "adapter, working copy": self.adapter,
            "adapter, master weights": self.master_weights,
            "adapter gradients, summed": self.gradients,
            "optimizer state": self.optimizer_state,
            "loss": self.loss,
            "VAE": self.vae,
            "text encoders": self.text_encoder,
        }
        described = {what: str(dtype).removeprefix("torch.") for what, dtype in names.items()}
        if self.storage != "compute":
            described["frozen UNet weights"] = f"{self.storage}, restored in {described['activations']} for each use"
        return described


def dtype_policy(
    precision: str,
    *,
    optimizer: str,
    optimizer_kwargs: Mapping[str, Any],
    numbers: Sequence[int],
    vae: torch.dtype,
    storage: str = "compute",
    trains_text: bool = False,
) -> DtypePolicy:
    """The policy of a resolved precision. With `trains_text`, the text encoders are trained too.

    `optimizer` is its name in the config, `numbers` the sizes of its parameter groups, `vae` the dtype of the VAE.
    bitsandbytes keeps the state of a parameter below 4,096 numbers in fp32. A parameter of its 8-bit optimizers is a whole
    group, or a tensor if `min_8bit_size` is given.
    """
    compute = COMPUTE_DTYPES[precision]
    eight_bits = "uint8" if max(numbers) >= 4096 else "float32"
    if min(numbers) < 4096 <= max(numbers):
        eight_bits = "uint8, float32 for groups below 4096 numbers"
    if "min_8bit_size" in optimizer_kwargs:
        eight_bits = f"uint8, float32 for tensors below {optimizer_kwargs['min_8bit_size']} numbers"
    in_float = ("adafactor", "adamw", "adamw_schedulefree", "came", "lion", "muon", "prodigy", "stableadamw")
    states = {"adamw8bit": eight_bits, "lion8bit": eight_bits} | dict.fromkeys(in_float, "float32")
    return DtypePolicy(
        weights=compute,
        activations=compute,
        adapter=compute,
        master_weights=torch.float32,
        gradients=torch.float32,
        optimizer_state=states.get(optimizer, f"as {optimizer} keeps it"),
        loss=torch.float32,
        vae=vae,
        text_encoder=compute if trains_text else torch.float32,
        storage=storage,
    )


def make_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """The loss scaler: active for fp16, whose gradients underflow without it, and a no-op otherwise.

    Usage: scale the loss. Call `unscale_(optimizer)` after `MasterWeights.reduce`, so that all processes find the same infinities
    in the fp32 gradients. Then `step(optimizer)` skips a step with an infinity, leaving master weights and optimizer state
    unchanged, and `update()` halves the scale. `state_dict()` holds plain numbers.
    """
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")
