"""What a step asks of the device, counted: whole numbers that no busy machine can blur.

The rule of counting. PyTorch's dispatcher is watched below autograd, so forward pass, backward pass and optimizer are
all seen, each kernel call as the operator that is dispatched (`aten.mm`, `aten._to_copy`). An **op** is every such
call that computes or moves data. Not counted:

- views: operators whose result is, by their schema, an alias of an argument that they do not write to (`t`, `view`,
  `transpose`, `detach`, `split`, `slice`), and `_unsafe_view`, a view whose schema does not say so;
- bare allocation: `empty` and its relatives; a buffer that is filled (`zeros`, `ones_like`, `arange`) counts;
- what is not of the tensor library: the namespaces `prim` and `profiler`.

A **dtype copy** is an op that does nothing but write tensors in another dtype: `_to_copy`, `copy_` and `_foreach_copy_`
whose source and result differ in dtype. A conversion inside another kernel (bf16 + fp32) is no op of its own.

**Saved bytes** are the storages that autograd keeps between forward and backward pass: each once and whole, also where
only a part of it is saved. The model's own parameters, which are there anyway, are skipped.

The counts hold for the backend that they are counted on: attention is one fused op where a fused kernel is taken.
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
    """Ops of a step, how many of them are dtype copies, and the bytes saved for its backward pass."""

    ops: int
    dtype_copies: int
    saved_bytes: int


def count(step: Callable[[], Any], parameters: Iterable[torch.Tensor]) -> Counts:
    """Runs `step` once and counts by the rule above; `parameters` are the model's, left out of the saved bytes.

    Run the step once before: the first one also makes the optimizer's state.
    """
    known = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    # The storages are kept until the end, or a freed one's address would come again and count as the same.
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
    """Counts ops while it is active (torch's interface for seeing them is this base class)."""

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
