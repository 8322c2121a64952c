"""A frozen UNet whose weights are held in fewer bits: each weight is made again in the compute dtype wherever it is used.

    int8    integers -127..127 in blocks of 64 with a scale in the compute dtype: 8.25 bits per weight in bf16
    fp8     e4m3 numbers with a power of two for each row: 8 bits per weight
    nf4     bitsandbytes' NormalFloat in blocks of 64, whose scales have 8 bits (arXiv 2305.14314): 4.13 bits per weight

The storage is that of the linear layers in the UNet's blocks; the convolutions there are in int8 with each of them. What is
outside the blocks stays as it is (conv_in, conv_out, the embeddings of time and sizes: 0.3 % of SDXL's weights), and so do norms
and biases.
docs/small_base.md has the numbers behind that.

A stored layer is an `nn.Linear` or `nn.Conv2d`, so that peft gives it its plain LoRA layers. Its `weight` is the stored tensor, of
dtype uint8. Forward and backward pass each restore the weight, and autograd keeps neither of the two. Restoring depends on no value
and does not wait for the device, so that a step with stored layers can be recorded as a CUDA graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from sushi_research.errors import UserError, first_line

Storage = Literal["compute", "int8", "fp8", "nf4"]

# The parts of the UNet whose layers are stored. Their smallest layer has 102,400 weights in SD1.5 and 204,800 in SDXL.
BLOCKS = ("down_blocks.", "mid_block.", "up_blocks.")
# Layers of a tiny base with fewer weights stay in the compute dtype.
LEAST_WEIGHTS = 1024
# The largest numbers of int8 and of e4m3. The weights of a block of int8 and nf4, and the scales of a block of nf4's scales.
INT8_MOST, FP8_MOST = 127.0, 448.0
BLOCK, SCALES_BLOCK = 64, 256

# The tensors of a stored weight: the numbers (uint8), and what their form needs beside them.
Parts = tuple[torch.Tensor, ...]


def _store_int8(weight: torch.Tensor) -> Parts:
    blocks = weight.reshape(-1, BLOCK)
    # Rounded to the compute dtype before the division, so that its rounding is no error of the numbers.
    scale = (blocks.abs().amax(1, keepdim=True).float() / INT8_MOST).to(weight.dtype)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    numbers = (blocks.float() / scale.float()).round_().clamp_(-INT8_MOST, INT8_MOST).to(torch.int8)
    return numbers.view(torch.uint8).view(weight.shape), scale


def _restore_int8(parts: Parts, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    numbers, scale = parts
    assert scale.dtype == dtype
    # torch converts the integers within the product: one kernel.
    return (numbers.view(torch.int8).view(-1, BLOCK) * scale).view(shape)


def _store_fp8(weight: torch.Tensor) -> Parts:
    rows = weight.flatten(1).float()
    # The smallest power of two that brings the row into the range of the numbers, because a product with it is exact; but not less
    # than fp16 has.
    mantissa, exponent = torch.frexp((rows.abs().amax(1, keepdim=True) / FP8_MOST).clamp_min(2.0**-24))
    scale = torch.exp2((exponent - (mantissa == 0.5).int()).float())
    numbers = (rows / scale).to(torch.float8_e4m3fn).view(torch.uint8)
    return numbers.view(weight.shape), scale.to(weight.dtype)


def _restore_fp8(parts: Parts, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    numbers, scale = parts
    return numbers.view(torch.float8_e4m3fn).view(len(scale), -1).to(dtype).mul_(scale).view(shape)


def _store_nf4(weight: torch.Tensor) -> Parts:
    from bitsandbytes.functional import quantize_4bit

    rows = weight.flatten(1).contiguous()
    numbers, state = quantize_4bit(rows, blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
    return numbers, state.absmax, state.state2.absmax, state.state2.code, state.offset


def _restore_nf4(parts: Parts, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    from bitsandbytes.functional import QuantState, dequantize_4bit

    numbers, scales, scales_of_scales, code, offset = parts
    rows = torch.Size((shape[0], math.prod(shape[1:])))
    nested = QuantState(absmax=scales_of_scales, code=code, blocksize=SCALES_BLOCK, dtype=torch.float32)
    state = QuantState(
        absmax=scales, shape=rows, blocksize=BLOCK, quant_type="nf4", dtype=dtype, offset=offset, state2=nested
    )
    return dequantize_4bit(numbers, state).view(shape)


_FORMS: dict[str, tuple[Callable[..., Parts], Callable[..., torch.Tensor]]] = {
    "int8": (_store_int8, _restore_int8),
    "fp8": (_store_fp8, _restore_fp8),
    "nf4": (_store_nf4, _restore_nf4),
}


class _LinearFunction(torch.autograd.Function):
    """A linear layer's forward pass, and the gradient of its input. It keeps the layer, which restores its weight again."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: StoredLinear) -> torch.Tensor:
        ctx.layer = layer
        return F.linear(x, layer.restored(), layer.bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient @ ctx.layer.restored(), None


class _ConvFunction(torch.autograd.Function):
    """The same for a convolution."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: StoredConv2d) -> torch.Tensor:
        ctx.layer, ctx.shape = layer, x.shape
        return F.conv2d(x, layer.restored(), layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        layer, weight = ctx.layer, ctx.layer.restored()
        where = (layer.stride, layer.padding, layer.dilation, layer.groups)
        return nn.grad.conv2d_input(ctx.shape, weight, gradient, *where), None


class _Stored(nn.Module):
    """The weight of a stored layer. `hold` makes a layer a stored one."""

    storage: Storage = "compute"
    _parts: tuple[str, ...] = ()

    def hold(self, weight: torch.Tensor, storage: Storage) -> None:
        """Takes `weight` in the form `storage`. It does not depend on anything else, so that a resumed run has the same one."""
        numbers, *others = _FORMS[storage][0](weight)
        self.storage, self._shape, self._dtype = storage, weight.shape, weight.dtype
        self.weight = nn.Parameter(numbers, requires_grad=False)
        self._parts = tuple(f"weight_part_{number}" for number in range(1, 1 + len(others)))
        for name, part in zip(self._parts, others, strict=True):
            self.register_buffer(name, part, persistent=False)

    def restored(self) -> torch.Tensor:
        """The weight in its own shape and dtype, as a new tensor."""
        parts = (self.weight, *(getattr(self, name) for name in self._parts))
        return _FORMS[self.storage][1](parts, self._shape, self._dtype)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        before = [getattr(self, name).dtype for name in self._parts]
        super()._apply(fn, recurse)
        now = [getattr(self, name).dtype for name in self._parts]
        assert now == before, "a stored weight cannot be cast: load the base in that dtype"
        return self


class StoredLinear(_Stored, nn.Linear):
    """A frozen linear layer whose weight is stored."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _LinearFunction.apply(x, self)


class StoredConv2d(_Stored, nn.Conv2d):
    """A frozen convolution whose weight is stored.

    peft makes the matrices of its adapter with the class of the layer. Without `hold` they are plain convolutions.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if self.storage == "compute" else _ConvFunction.apply(x, self)


def stored_layer(layer: nn.Linear | nn.Conv2d, weight: torch.Tensor, storage: Storage) -> StoredLinear | StoredConv2d:
    """A layer like `layer`, with its bias, that holds `weight` in the form `storage`."""
    made: StoredLinear | StoredConv2d
    if isinstance(layer, nn.Linear):
        made = StoredLinear(layer.in_features, layer.out_features, bias=False, device="meta")
    else:
        assert layer.padding_mode == "zeros", layer.padding_mode
        sizes = (layer.in_channels, layer.out_channels, layer.kernel_size)
        where = (layer.stride, layer.padding, layer.dilation, layer.groups)
        made = StoredConv2d(*sizes, *where, bias=False, device="meta")
    made.bias = layer.bias
    made.hold(weight, storage)
    return made.train(layer.training)


def weight_of(layer: nn.Module) -> torch.Tensor:
    """The weight of a layer in its own shape, without gradient: that of a stored one is restored as a new tensor."""
    if isinstance(layer, _Stored) and layer.storage != "compute":
        return layer.restored()
    assert isinstance(layer.weight, torch.Tensor)
    return layer.weight.detach()


def storage_of(path: str, layer: nn.Module, storage: Storage) -> Storage:
    """How the weight of the layer at `path` of a UNet is held with this `storage`: as at the top of this file."""
    if not (isinstance(layer, nn.Linear | nn.Conv2d) and path.startswith(BLOCKS)):
        return "compute"
    if storage == "compute" or layer.weight.numel() < LEAST_WEIGHTS or layer.weight.numel() % BLOCK:
        return "compute"
    return "int8" if isinstance(layer, nn.Conv2d) else storage


def put(model: nn.Module, name: str, value: torch.Tensor, storage: Storage) -> None:
    """Sets the frozen parameter `name` of a component to `value`. With a `storage`, its layer may become a stored layer.

    Called for each tensor as it is read: so no more than one weight is in memory in both forms.
    """
    path, _, leaf = name.rpartition(".")
    layer = model.get_submodule(path)
    held = storage_of(path, layer, storage) if leaf == "weight" else "compute"
    if held == "compute":
        setattr(layer, leaf, nn.Parameter(value, requires_grad=False))
    else:
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        parent, _, own = path.rpartition(".")
        setattr(model.get_submodule(parent), own, stored_layer(layer, value, held))


def weight_bytes(unet: nn.Module, dtype: torch.dtype, storage: Storage) -> int:
    """The bytes of the UNet's weights in this dtype and storage. `unet` has plain layers; they may be on the meta device."""
    total = sum(parameter.numel() for parameter in unet.parameters()) * dtype.itemsize
    for path, layer in unet.named_modules():
        held = storage_of(path, layer, storage)
        if held != "compute":
            count, rows = layer.weight.numel(), len(layer.weight)
            total += _stored_bytes(held, count, rows, dtype.itemsize) - count * dtype.itemsize
    return total


def _stored_bytes(storage: Storage, count: int, rows: int, itemsize: int) -> int:
    if storage == "int8":
        return count + count // BLOCK * itemsize
    if storage == "fp8":
        return count + rows * itemsize
    scales = count // BLOCK
    return (
        count // 2 + scales + 4 * math.ceil(scales / SCALES_BLOCK) + 4 * 256 + 4
    )  # the code of the scales, and their mean


def require_usable(storage: Storage, dtype: torch.dtype, device: torch.device) -> None:
    """UserError unless this storage runs here: stores and restores a weight on the device."""
    if storage == "compute":
        return
    layer = nn.Linear(BLOCK, BLOCK, bias=False, device=device, dtype=dtype)
    try:
        restored = stored_layer(layer, layer.weight.detach(), storage).restored()
        close = bool(torch.allclose(restored.float(), layer.weight.float(), atol=0.05))
    # A missing library or dtype, a library without its kernels, a device that lacks an operation: each has its own error.
    except Exception as error:
        raise UserError(
            f"model.base_storage is {storage}, which does not run here ({first_line(error)}): "
            f"take {'compute' if storage == 'int8' else 'int8 or compute'}."
        ) from error
    if not close:
        raise UserError(f"model.base_storage is {storage}, and this device does not restore its weights: take compute.")
