"""Which tensor has which dtype, and what keeps fp32 where it is needed.

The frozen UNet and its activations are in the compute dtype. The adapter exists twice: fp32 masters, which the
optimizer steps, and a working copy in the compute dtype, which the UNet computes with and which is refreshed once per
step. The gradients of every micro-batch are added up in fp32. With a bf16 adapter alone, a large share of A's entries
would never move: an Adam step at lr 1e-4 is less than half of bf16's spacing there. The loss is computed in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

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
    masters: torch.dtype
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
            "adapter, masters": self.masters,
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
        masters=torch.float32,
        gradients=torch.float32,
        optimizer_state=states.get(optimizer, f"as {optimizer} keeps it"),
        loss=torch.float32,
        vae=vae,
        text_encoder=torch.float32,
    )


class Masters:
    """The fp32 masters of an adapter with their gradients, and the working copy in the UNet.

    A step is: `accumulate()` after each backward pass, `reduce()` once, then whatever unscales and clips the gradients
    of `parameters()`, the optimizer's step, `refresh()` and `zero_grad()`. Gradients are zeroed here and never by the
    optimizer, because they are views.

    Values, gradients and working copy are one flat buffer each, of which every tensor is a view: so a sum, a refresh or
    a reduction is one kernel or one message instead of one per tensor (1,120 for SDXL's attention). The views of the
    real models stay aligned for fast kernels, since all of their layers have multiples of 64 channels.
    """

    def __init__(self, working: Mapping[str, nn.Parameter], dtype: torch.dtype) -> None:
        """`working`: the fp32 tensors of `adapter_parameters(unet)`, on their final device; they become `dtype`."""
        assert working and all(parameter.dtype == torch.float32 for parameter in working.values())
        self._names = list(working)
        self._working = list(working.values())
        self._values = torch.cat([parameter.detach().reshape(-1) for parameter in self._working])
        self._gradient = torch.zeros_like(self._values)
        self._copy = self._values.to(dtype, copy=True)
        self._masters = [nn.Parameter(view) for view in self._views(self._values)]
        for master, gradient in zip(self._masters, self._views(self._gradient), strict=True):
            master.grad = gradient
        for parameter, view in zip(self._working, self._views(self._copy), strict=True):
            parameter.data = view
            parameter.grad = None

    def parameters(self) -> list[nn.Parameter]:
        """The masters, in the order of the UNet's modules: what the optimizer takes."""
        return self._masters

    @torch.no_grad()
    def accumulate(self) -> None:
        """Adds the working copy's gradients to the masters' in fp32, and clears them."""
        self._check_views()
        gradients = []
        for name, parameter in zip(self._names, self._working, strict=True):
            assert parameter.grad is not None, f"{name} got no gradient"
            gradients.append(parameter.grad.reshape(-1))
            parameter.grad = None
        # The sum of fp32 and a lower dtype is computed in fp32, to which the lower one converts exactly.
        self._gradient += torch.cat(gradients)

    @torch.no_grad()
    def refresh(self) -> None:
        """Rounds the masters into the working copy."""
        self._check_views()
        self._copy.copy_(self._values)

    def zero_grad(self) -> None:
        """Sets the masters' gradients to zero."""
        self._gradient.zero_()

    @torch.no_grad()
    def reduce(self, reduce_fn: Callable[[torch.Tensor], torch.Tensor] | None, extras: torch.Tensor) -> torch.Tensor:
        """Sums the gradients and `extras` (an fp32 vector) over the processes in one message; returns the extras' sums.

        `reduce_fn` takes a vector and returns its sum over the processes; None stands for a single process.
        """
        assert extras.dtype == torch.float32 and extras.ndim == 1
        if reduce_fn is None:
            return extras
        total = reduce_fn(torch.cat([self._gradient, extras]))
        self._gradient.copy_(total[: self._gradient.numel()])
        return total[self._gradient.numel() :].clone()

    @torch.no_grad()
    def named_state(self) -> dict[str, torch.Tensor]:
        """A copy of the masters by name, fp32: what checkpoints and adapter files hold."""
        return {name: master.detach().clone() for name, master in zip(self._names, self._masters, strict=True)}

    @torch.no_grad()
    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Sets the masters to the tensors of `named_state()`, and refreshes the working copy."""
        assert list(state) == self._names, "the state is not that of this adapter"
        for master, tensor in zip(self._masters, state.values(), strict=True):
            assert tensor.dtype == torch.float32 and tensor.shape == master.shape
            master.copy_(tensor)
        self.refresh()

    def _views(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        pieces = buffer.split([parameter.numel() for parameter in self._working])
        return [piece.view(parameter.shape) for piece, parameter in zip(pieces, self._working, strict=True)]

    def _check_views(self) -> None:
        """Moving the UNet, or letting the optimizer drop gradients, would part the tensors from their buffers."""
        gradient, buffers = self._masters[0].grad, (self._values, self._gradient, self._copy)
        assert gradient is not None, "an adapter gradient was removed: use Masters.zero_grad"
        for tensor, buffer in zip((self._masters[0], gradient, self._working[0]), buffers, strict=True):
            assert tensor.data_ptr() == buffer.data_ptr(), "an adapter tensor was moved after Masters was made"


def make_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """The loss scaler: at work for fp16, whose gradients underflow without it; passes everything through otherwise.

    Scale the loss; `unscale_(optimizer)` after `Masters.reduce`, so that all processes find the same infinities in the
    fp32 gradients; then `step(optimizer)` leaves out a step with an infinity, touching neither masters nor optimizer
    state, and `update()` halves the scale. `state_dict()` holds plain numbers.
    """
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")
