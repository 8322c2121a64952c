"""The fp32 master weights of an adapter, their gradients, and the copy in the compute dtype that the UNet uses."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn


class MasterWeights:
    """The fp32 master weights of an adapter with their gradients, and the working copy in the UNet.

    One step: call `accumulate()` after each backward pass and `reduce()` once, unscale and clip the gradients of
    `parameters()`, step the optimizer, then call `refresh()` and `zero_grad()`. Do not let the optimizer zero the
    gradients: they are views.

    Values, gradients and working copy are one flat buffer each, and every tensor is a view into it. A sum, a refresh or
    a reduction is then one kernel or one message instead of one per tensor (1,120 for SDXL's attention). The views of
    real models stay aligned for fast kernels, because all of their layers have multiples of 64 channels.
    """

    def __init__(self, working: Mapping[str, nn.Parameter], dtype: torch.dtype) -> None:
        """`working`: the fp32 tensors of `adapter_parameters(unet)`, on their final device. They are converted to `dtype`."""
        assert working and all(parameter.dtype == torch.float32 for parameter in working.values())
        self._names = list(working)
        self._working = list(working.values())
        self._values = torch.cat([parameter.detach().reshape(-1) for parameter in self._working])
        self._gradient = torch.zeros_like(self._values)
        self._copy = self._values.to(dtype, copy=True)
        self._master_weights = [nn.Parameter(view) for view in self._views(self._values)]
        for master, gradient in zip(self._master_weights, self._views(self._gradient), strict=True):
            master.grad = gradient
        for parameter, view in zip(self._working, self._views(self._copy), strict=True):
            parameter.data = view
            parameter.grad = None

    def parameters(self) -> list[nn.Parameter]:
        """The master weights, in the order of the UNet's modules, for the optimizer."""
        return self._master_weights

    @torch.no_grad()
    def accumulate(self) -> None:
        """Adds the working copy's gradients to those of the master weights in fp32, and clears them."""
        self._check_views()
        gradients = []
        for name, parameter in zip(self._names, self._working, strict=True):
            assert parameter.grad is not None, f"{name} got no gradient"
            gradients.append(parameter.grad.reshape(-1))
            parameter.grad = None
        # torch computes the sum of fp32 and a lower dtype in fp32; the conversion to fp32 is exact.
        self._gradient += torch.cat(gradients)

    @torch.no_grad()
    def refresh(self) -> None:
        """Copies the master weights to the working copy, rounded to its dtype."""
        self._check_views()
        self._copy.copy_(self._values)

    def zero_grad(self) -> None:
        """Sets the master weights' gradients to zero."""
        self._gradient.zero_()

    @torch.no_grad()
    def reduce(self, reduce_fn: Callable[[torch.Tensor], torch.Tensor] | None, extras: torch.Tensor) -> torch.Tensor:
        """Sums the gradients and `extras` (an fp32 vector) over the processes in one message. Returns the summed extras.

        `reduce_fn` takes a vector and returns its sum over the processes; None means a single process.
        """
        assert extras.dtype == torch.float32 and extras.ndim == 1
        if reduce_fn is None:
            return extras
        total = reduce_fn(torch.cat([self._gradient, extras]))
        self._gradient.copy_(total[: self._gradient.numel()])
        return total[self._gradient.numel() :].clone()

    @torch.no_grad()
    def named_state(self) -> dict[str, torch.Tensor]:
        """An fp32 copy of the master weights by name, for checkpoints and adapter files."""
        return {name: master.detach().clone() for name, master in zip(self._names, self._master_weights, strict=True)}

    def problem_of(self, state: Mapping[str, Any]) -> str | None:
        """How `state` differs from what `named_state()` gives; None if it has the same names, shapes and dtype."""
        if list(state) != self._names:
            return f"it has other adapter tensors: {len(state)} instead of {len(self._names)}, or under other names"
        for (name, tensor), master in zip(state.items(), self._master_weights, strict=True):
            if not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.float32 or tensor.shape != master.shape:
                return f"its {name} is not float32 of {list(master.shape)}"
        return None

    @torch.no_grad()
    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Sets the master weights to tensors from `named_state()` and refreshes the working copy."""
        problem = self.problem_of(state)
        assert problem is None, f"the state is not that of this adapter: {problem}"
        for master, tensor in zip(self._master_weights, state.values(), strict=True):
            master.copy_(tensor)
        self.refresh()

    @contextlib.contextmanager
    def preserved(self) -> Iterator[None]:
        """A block that may change the master weights. They and the working copy are restored at its end, bit for bit."""
        values = self._values.clone()
        try:
            yield
        finally:
            self._values.copy_(values)
            self.refresh()

    def are_views(self) -> bool:
        """Whether all values and gradients are still views of the buffers. An optimizer may have replaced one."""
        tensors = zip(self._master_weights, self._views(self._values), self._views(self._gradient), strict=True)
        return all(
            master.data_ptr() == value.data_ptr()
            and master.grad is not None
            and master.grad.data_ptr() == gradient.data_ptr()
            for master, value, gradient in tensors
        )

    def holds_gradient(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor shares its memory with the gradients, which `zero_grad` overwrites."""
        return tensor.untyped_storage().data_ptr() == self._gradient.untyped_storage().data_ptr()

    def _views(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        pieces = buffer.split([parameter.numel() for parameter in self._working])
        return [piece.view(parameter.shape) for piece, parameter in zip(pieces, self._working, strict=True)]

    def _check_views(self) -> None:
        """Asserts that the tensors are still views: moving the UNet or dropping gradients would detach them from the buffers."""
        gradient, buffers = self._master_weights[0].grad, (self._values, self._gradient, self._copy)
        assert gradient is not None, "an adapter gradient was removed: use MasterWeights.zero_grad"
        for tensor, buffer in zip((self._master_weights[0], gradient, self._working[0]), buffers, strict=True):
            assert tensor.data_ptr() == buffer.data_ptr(), "an adapter tensor was moved after MasterWeights was made"
