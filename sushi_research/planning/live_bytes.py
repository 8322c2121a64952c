"""Counts the bytes of all tensors that are alive at once during a step: exact numbers, on real tensors and on fake ones.

PyTorch's dispatcher is observed below autograd, as in op_counts.py. Each new storage counts in full from the operator that made it
until it is freed, whoever holds it: the script, autograd or an optimizer. What an operator allocates and frees within itself (the
workspace of a convolution) is not seen, nor is what an allocator rounds up, caches or cannot fill.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveStorages:
    """The storages that were added and still exist. It keeps none of them alive; `freed` is called with the size of a freed one."""

    def __init__(self, freed: Callable[[int], None] = lambda size: None) -> None:
        # By address, which another storage gets once the first is freed.
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._freed = freed

    def add(self, tensor: torch.Tensor) -> int:
        """Adds the tensor's storage. Returns its size in bytes, or 0 if it is known."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return 0

        def freed(_: object) -> None:
            del self._storages[key]
            self._freed(size)

        self._storages[key] = weakref.ref(storage, freed)
        return size


class LiveBytes(TorchDispatchMode):
    """While it is active, follows the storages that operators make. `live` and `peak` are in bytes.

    `held` are tensors made before whose storages count too, such as the weights. For the peak of a step, run the step once before,
    because the first also creates the optimizer's state, and then set `peak = live`.
    """

    def __init__(self, held: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._storages = LiveStorages(self._freed)
        for tensor in held:
            self.hold(tensor)

    def hold(self, tensor: torch.Tensor) -> None:
        """Counts the tensor's storage from now on, if it is not counted already."""
        self.live += self._storages.add(tensor)
        self.peak = max(self.peak, self.live)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            for each in tree_iter(result):
                if isinstance(each, torch.Tensor):
                    self.hold(each)
        return result

    def _freed(self, size: int) -> None:
        self.live -= size
