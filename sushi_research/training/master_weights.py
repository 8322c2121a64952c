"""The fp32 master weights of an adapter, their gradients, and the copy in the compute dtype that the UNet uses."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn


class MasterWeights:
    """The fp32 master weights of an adapter with their gradients, and the working copy in the UNet.

    One step: call `accumulate()` after each backward pass and `reduce()` once, unscale and clip the gradients of
    `flat_parameters()`, step the optimizer, then call `refresh()` and `zero_grad()`. Do not let the optimizer zero the
    gradients: they are views.

    Values, gradients and working copy are one flat buffer each, and every tensor is a view into it. A sum, a refresh, a
    reduction, a clip and the step of an elementwise optimizer (`optim.is_elementwise`) are then one kernel or one message
    instead of one per tensor (1,120 for SDXL's attention). The views of real models stay aligned for fast kernels, because
    all of their layers have multiples of 64 channels.

    No buffer moves after it was made, so a recording of a step (a CUDA graph) stays valid; `require_in_place` checks that.
    """

    def __init__(
        self,
        working: Mapping[str, nn.Parameter],
        dtype: torch.dtype,
        groups: Sequence[Sequence[str]] | None = None,
        *,
        idle: Collection[str] = (),
    ) -> None:
        """`working`: the fp32 tensors of `adapter_parameters(unet)`, on their final device. They are converted to `dtype`.

        `groups` are the names of each parameter group, every name in exactly one; None puts all in one group. The buffers have
        the order of the groups. `idle` names tensors that may get no gradient, which counts as zeros.
        """
        self._idle = frozenset(idle)
        assert working and all(parameter.dtype == torch.float32 for parameter in working.values())
        groups = [list(working)] if groups is None else [list(group) for group in groups]
        self._names = [name for group in groups for name in group]
        assert all(groups) and sorted(self._names) == sorted(working), "the groups do not hold every tensor once"
        self._groups = groups
        self._working = [working[name] for name in self._names]
        self._values = torch.cat([parameter.detach().reshape(-1) for parameter in self._working])
        self._gradient = torch.zeros_like(self._values)
        self._copy = self._values.to(dtype, copy=True)
        self._master_weights = _parameters(self._views(self._values), self._views(self._gradient))
        self._flat = _parameters(self._ranges(self._values), self._ranges(self._gradient))
        for parameter, view in zip(self._working, self._views(self._copy), strict=True):
            parameter.data = view
            parameter.grad = None
        self._frozen: frozenset[int] = frozenset()
        # What `accumulate` adds: tensors that follow each other, by number, and their range of the gradients.
        self._trained = [(range(len(self._names)), self._gradient)]

    def parameters(self) -> list[nn.Parameter]:
        """The master weights as one parameter per tensor, in the order of the groups: for optimizers that are not elementwise."""
        return self._master_weights

    def flat_parameters(self) -> list[nn.Parameter]:
        """The master weights as one parameter [n] per group: all values of the group, tensor after tensor.

        They share their memory with `parameters()`; values and gradients are whole contiguous ranges of the buffers.
        """
        return self._flat

    def groups(self) -> list[list[str]]:
        """The names of the tensors of each parameter group, in the order in which `flat_parameters()` holds them."""
        return self._groups

    @property
    def values(self) -> torch.Tensor:
        """The master weights [n], as `flat_parameters()` has them: group after group, tensor after tensor."""
        return self._values

    def named_views(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors in a buffer [n] that is laid out as `values`, by name."""
        return dict(zip(self._names, self._views(buffer), strict=True))

    def shapes(self) -> dict[str, torch.Size]:
        """The shape of each tensor by name, in the order of the groups."""
        return {name: master.shape for name, master in zip(self._names, self._master_weights, strict=True)}

    @torch.no_grad()
    def accumulate(self) -> None:
        """Adds the working copy's gradients to those of the master weights in fp32, and clears them."""
        self.require_in_place()
        for numbers, total in self._trained:
            gradients = []
            for number in numbers:
                parameter = self._working[number]
                gradient = parameter.grad
                if gradient is None:
                    assert self._names[number] in self._idle, f"{self._names[number]} got no gradient"
                    gradient = torch.zeros_like(parameter)
                gradients.append(gradient.reshape(-1))
                parameter.grad = None
            # torch computes the sum of fp32 and a lower dtype in fp32; the conversion to fp32 is exact.
            total += torch.cat(gradients)

    def freeze(self, groups: Collection[int]) -> bool:
        """Ends the training of these groups, by number. True if one of them was trained until now.

        Their working copy gets no gradients any more, so a recording of a step has to be dropped. Their values stay as they are if
        the optimizer's step is in a block of `frozen_kept()`.
        """
        if self._frozen == frozenset(groups):
            return False
        assert self._frozen < frozenset(groups), "a group that was frozen is not trained again"
        self._frozen = frozenset(groups)
        self._trained, first = [], 0
        for number, (names, total) in enumerate(zip(self._groups, self._ranges(self._gradient), strict=True)):
            numbers = range(first, first + len(names))
            first = numbers.stop
            if number not in self._frozen:
                self._trained.append((numbers, total))
                continue
            for place in numbers:
                self._working[place].requires_grad_(False)
                self._working[place].grad = None
        return True

    @contextlib.contextmanager
    def frozen_kept(self) -> Iterator[None]:
        """A block in which the optimizer steps. Frozen groups have their values back at its end, bit for bit.

        A learning rate of zero is not enough: Prodigy and optimizers that average the weights move a group with that rate too.
        """
        kept = [(self._flat[number], self._flat[number].detach().clone()) for number in sorted(self._frozen)]
        try:
            yield
        finally:
            with torch.no_grad():
                for flat, values in kept:
                    flat.copy_(values)

    def discard(self) -> None:
        """Clears the working copy's gradients, of a backward pass that was not completed."""
        for parameter in self._working:
            parameter.grad = None

    @torch.no_grad()
    def refresh(self) -> None:
        """Copies the master weights to the working copy, rounded to its dtype."""
        self.require_in_place()
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
        if state.keys() != set(self._names):
            return f"it has other adapter tensors: {len(state)} instead of {len(self._names)}, or under other names"
        for name, master in zip(self._names, self._master_weights, strict=True):
            tensor = state[name]
            if not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.float32 or tensor.shape != master.shape:
                return f"its {name} is not float32 of {list(master.shape)}"
        return None

    @torch.no_grad()
    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Sets the master weights to tensors from `named_state()` and refreshes the working copy."""
        problem = self.problem_of(state)
        assert problem is None, f"the state is not that of this adapter: {problem}"
        for name, master in zip(self._names, self._master_weights, strict=True):
            master.copy_(state[name])
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

    @contextlib.contextmanager
    def replaced_by(self, values: torch.Tensor) -> Iterator[None]:
        """A block in which the master weights are these values [n], laid out as `values`; restored at its end, bit for bit."""
        with self.preserved():
            self._values.copy_(values)
            self.refresh()
            yield

    def are_views(self) -> bool:
        """Whether all values and gradients are still views of the buffers. An optimizer may have replaced one."""
        singles = zip(self._master_weights, self._views(self._values), self._views(self._gradient), strict=True)
        flat = zip(self._flat, self._ranges(self._values), self._ranges(self._gradient), strict=True)
        return all(
            _is_at(master, value) and _is_at(master.grad, gradient)
            for tensors in (singles, flat)
            for master, value, gradient in tensors
        )

    def holds_gradient(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor shares its memory with the gradients, which `zero_grad` overwrites."""
        return tensor.untyped_storage().data_ptr() == self._gradient.untyped_storage().data_ptr()

    def require_in_place(self) -> None:
        """Asserts that buffers and views are where they were made: moving the UNet or dropping gradients would detach them.

        It looks at the addresses of a few tensors and waits for nothing, so it can be called before every replay of a recording.
        """
        for parameter in (self._master_weights[0], *self._flat):
            assert parameter.grad is not None, "an adapter gradient was removed: use MasterWeights.zero_grad"
        first, last, flat = self._master_weights[0], self._working[-1], self._flat[0]
        tail = self._copy[-last.numel() :]
        pairs = (
            *((first, self._values), (first.grad, self._gradient), (flat, self._values), (flat.grad, self._gradient)),
            *((self._working[0], self._copy), (last, tail)),
        )
        assert all(_is_at(*pair) for pair in pairs), "an adapter tensor was moved after MasterWeights was made"

    def _views(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """The tensors in a buffer, in the order of `_names`."""
        pieces = buffer.split([parameter.numel() for parameter in self._working])
        return [piece.view(parameter.shape) for piece, parameter in zip(pieces, self._working, strict=True)]

    def _ranges(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """The groups in a buffer, [n] each."""
        numbers = {name: parameter.numel() for name, parameter in zip(self._names, self._working, strict=True)}
        return list(buffer.split([sum(numbers[name] for name in group) for group in self._groups]))


def _parameters(values: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor]) -> list[nn.Parameter]:
    parameters = [nn.Parameter(value) for value in values]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    return parameters


def _is_at(tensor: torch.Tensor | None, place: torch.Tensor) -> bool:
    return tensor is not None and tensor.data_ptr() == place.data_ptr()
