"""Counts the operations of a training step: exact numbers that do not depend on the machine's load.

PyTorch's dispatcher is observed below autograd, so forward pass, backward pass and optimizer are all counted, each kernel call
as the dispatched operator (`aten.mm`, `aten._to_copy`). An **op** is every such call that computes or moves data. Not counted:

- views: operators whose result, by their schema, is an alias of an argument that they do not write to (`t`, `view`,
  `transpose`, `detach`, `split`, `slice`), and `_unsafe_view`, a view whose schema does not declare it;
- bare allocation: `empty` and its variants; allocating and filling a buffer (`zeros`, `ones_like`, `arange`) is counted;
- operators outside the tensor library: the namespaces `prim` and `profiler`.

A **dtype copy** is an op that only writes tensors in another dtype: `_to_copy`, `copy_` and `_foreach_copy_` whose source and
result differ in dtype. A conversion inside another kernel (bf16 + fp32) is not an op of its own.

**FLOPs** are those of matrix products, convolutions and attention, by the formulas of torch's FlopCounterMode: a multiplication
and an addition are two. The backward pass of fused attention computes one product of the forward pass again, which counts.

**Saved bytes** are the storages that autograd keeps between forward and backward pass. Each storage is counted once and in full,
even if only a part of it is saved. The model's parameters, which are in memory anyway, are skipped.

The counts are specific to the backend: for example, attention is one op if a fused kernel is used. They are the same on fake
tensors (`torch._subclasses.FakeTensorMode`), which have shapes and no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass
from typing import Any, Self

import torch
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode

from sushi_research.planning.live_bytes import LiveStorages

_BOOKKEEPING = {
    "_unsafe_view",
    "empty",
    "empty_like",
    "empty_permuted",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
}
_NAMESPACES = {"prim", "profiler"}


@dataclass(frozen=True)
class Counts:
    """Ops of a step, the number of dtype copies among them, the bytes saved for its backward pass, and its FLOPs."""

    ops: int
    dtype_copies: int
    saved_bytes: int
    flops: int = 0

    def __sub__(self, other: Counts) -> Counts:
        """What was counted between two readings of a `Counter`."""
        return Counts(*(one - two for one, two in zip(astuple(self), astuple(other), strict=True)))


def count(step: Callable[[], Any], parameters: Iterable[torch.Tensor]) -> Counts:
    """Runs `step` once and counts as described above; the model's `parameters` are excluded from the saved bytes.

    Run the step once before, because the first step also creates the optimizer's state.
    """
    with Counter(parameters) as counter:
        step()
    return counter.counts()


class Counter(TorchDispatchMode):
    """Counts while it is active, and can be read at any time. The base class is torch's interface for observing operators."""

    def __init__(self, parameters: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self._ops = self._dtype_copies = self._saved_bytes = self._flops = 0
        self._storages = LiveStorages()
        for parameter in parameters:
            self._storages.add(parameter)
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._save, lambda tensor: tensor)

    def counts(self) -> Counts:
        """What was counted so far."""
        return Counts(self._ops, self._dtype_copies, self._saved_bytes, self._flops)

    def __enter__(self) -> Self:
        self._hooks.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._hooks.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not (func.is_view or name in _BOOKKEEPING or func.namespace in _NAMESPACES):
            self._ops += 1
            self._dtype_copies += _is_dtype_copy(name, args, result)
            if formula := FLOPS.get(func.overloadpacket):
                self._flops += formula(*args, **(kwargs or {}), out_val=result)
        return result

    def _save(self, tensor: torch.Tensor) -> torch.Tensor:
        self._saved_bytes += self._storages.add(tensor)
        return tensor


def _attention_flops(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> int:
    return flop_counter.sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward_flops(
    gradient: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> int:
    return flop_counter.sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape)


# By operator: its FLOPs, from its arguments and `out_val`, its result.
FLOPS: dict[Any, Callable[..., int]] = {
    **flop_counter.flop_registry,
    # torch knows the formulas, but not that these kernels, the CPU's, follow them.
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


def _is_dtype_copy(name: str, args: Any, result: Any) -> bool:
    if name == "_to_copy":
        return args[0].dtype != result.dtype
    if name == "copy_":
        return args[0].dtype != args[1].dtype
    if name == "_foreach_copy_":
        return any(target.dtype != source.dtype for target, source in zip(args[0], args[1], strict=True))
    return False
