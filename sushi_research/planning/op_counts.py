"""Counts the operations of a training step: exact numbers that do not depend on the machine's load.

PyTorch's dispatcher is observed below autograd, so forward pass, backward pass and optimizer are all counted, each kernel call
as the dispatched operator (`aten.mm`, `aten._to_copy`). An **op** is every such call that computes or moves data. Not counted:

- views: operators whose result, by their schema, is an alias of an argument that they do not write to (`t`, `view`,
  `transpose`, `detach`, `split`, `slice`), and `_unsafe_view`, a view whose schema does not declare it;
- bare allocation: `empty` and its variants; allocating and filling a buffer (`zeros`, `ones_like`, `arange`) is counted;
- operators outside the tensor library: the namespaces `prim` and `profiler`.

A **dtype copy** is an op that only writes tensors in another dtype: `_to_copy`, `copy_` and `_foreach_copy_` whose source and
result differ in dtype. A conversion inside another kernel (bf16 + fp32) is not an op of its own.

**Saved bytes** are the storages that autograd keeps between forward and backward pass. Each storage is counted once and in full,
even if only a part of it is saved. The model's parameters, which are in memory anyway, are skipped.

The counts are specific to the backend: for example, attention is one op if a fused kernel is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

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
    """Ops of a step, the number of dtype copies among them, and the bytes saved for its backward pass."""

    ops: int
    dtype_copies: int
    saved_bytes: int


def count(step: Callable[[], Any], parameters: Iterable[torch.Tensor]) -> Counts:
    """Runs `step` once and counts as described above; the model's `parameters` are excluded from the saved bytes.

    Run the step once before, because the first step also creates the optimizer's state.
    """
    known = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    # Keep the storages until the end: a freed storage's address could be reused and counted as the same storage.
    saved: dict[int, torch.UntypedStorage] = {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor), _Counter() as counter:
        step()
    return Counts(counter.ops, counter.dtype_copies, sum(storage.nbytes() for storage in saved.values()))


class _Counter(TorchDispatchMode):
    """Counts ops while it is active. The base class is torch's interface for observing them."""

    def __init__(self) -> None:
        super().__init__()
        self.ops = self.dtype_copies = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not (func.is_view or name in _BOOKKEEPING or func.namespace in _NAMESPACES):
            self.ops += 1
            self.dtype_copies += _is_dtype_copy(name, args, result)
        return result


def _is_dtype_copy(name: str, args: Any, result: Any) -> bool:
    if name == "_to_copy":
        return args[0].dtype != result.dtype
    if name == "copy_":
        return args[0].dtype != args[1].dtype
    if name == "_foreach_copy_":
        return any(target.dtype != source.dtype for target, source in zip(args[0], args[1], strict=True))
    return False
