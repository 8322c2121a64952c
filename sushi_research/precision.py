"""Which tensor has which dtype, and what keeps fp32 where it is needed.

The frozen UNet and its activations are in the compute dtype. The adapter exists twice: fp32 master weights, which the
optimizer steps, and a working copy in the compute dtype, which the UNet computes with and which is refreshed once per
step. The gradients of every micro-batch are added up in fp32. With a bf16 adapter alone, a large share of A's entries
would never move: an Adam step at lr 1e-4 is less than half of bf16's spacing there. The loss is computed in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sushi_research.errors import UserError

COMPUTE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def resolve_precision(configured: str, launcher: str | None, device: torch.device) -> str:
    """`"bf16"`, `"fp16"` or `"fp32"`.

    `launcher` is the environment's ACCELERATE_MIXED_PRECISION. Its bf16 and fp16 win; `no` is also what the launcher
    exports when the user said nothing, so then `configured` decides (bf16, fp16, fp32 or auto). auto is bf16 on a GPU
    that computes in it, fp16 on an older GPU, fp32 on a CPU. UserError for the launcher's fp8.
    """
    if launcher not in (None, "no", "bf16", "fp16"):
        raise UserError(
            f"the launcher's mixed precision is {launcher}, which this suite does not train in: "
            "launch with --mixed_precision bf16, fp16 or no."
        )
    if launcher in ("bf16", "fp16"):
        return launcher
    if configured != "auto":
        return configured
    if device.type != "cuda":
        return "fp32"
    # An emulated bf16 (GPUs before Ampere) costs more than it saves.
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


@dataclass(frozen=True)
class DtypePolicy:
    """The dtype of every tensor of a training step. `optimizer_state` is words, because a class may mix dtypes."""

    weights: torch.dtype
    activations: torch.dtype
    adapter: torch.dtype
    master_weights: torch.dtype
    gradients: torch.dtype
    optimizer_state: str
    loss: torch.dtype
    vae: torch.dtype
    text_encoder: torch.dtype

    def describe(self) -> dict[str, str]:
        """What -> dtype, in the order and words of the plan's print-out."""
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
        return {what: str(dtype).removeprefix("torch.") for what, dtype in names.items()}


def dtype_policy(precision: str, *, optimizer: str, vae: torch.dtype) -> DtypePolicy:
    """The policy of a resolved precision. `optimizer` is its config name; `vae` the dtype that `models` loads it in."""
    compute = COMPUTE_DTYPES[precision]
    states = {"adamw8bit": "uint8, float32 for tensors below 4,096 numbers", "adamw": "float32"}
    return DtypePolicy(
        weights=compute,
        activations=compute,
        adapter=compute,
        master_weights=torch.float32,
        gradients=torch.float32,
        optimizer_state=states.get(optimizer, f"as {optimizer} keeps it"),
        loss=torch.float32,
        vae=vae,
        text_encoder=torch.float32,
    )


def make_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """The loss scaler: at work for fp16, whose gradients underflow without it; passes everything through otherwise.

    Scale the loss; `unscale_(optimizer)` after `MasterWeights.reduce`, so that all processes find the same infinities in the
    fp32 gradients; then `step(optimizer)` leaves out a step with an infinity, touching neither master weights nor optimizer
    state, and `update()` halves the scale. `state_dict()` holds plain numbers.
    """
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")
