"""Stands in for CUDA graphs on a CPU: a "capture" runs the function, a "replay" runs it again, both on the static batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


class Rerun:
    """Has the methods of `fast.graphs.CudaGraphs`. What a capture changes in `buffers` is undone, since a real one runs nothing.

    `made` counts the captures, `released` the releases; `tight` is the answer to whether there is too little memory.
    """

    def __init__(self, buffers: Sequence[torch.Tensor], *, tight: bool = False) -> None:
        self.buffers, self.tight = buffers, tight
        self.made, self.replayed, self.released = 0, 0, 0
        self._alive: set[int] = set()

    def warm_up(self, function: Callable[[], None]) -> None:
        function()

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        before, random = [each.clone() for each in self.buffers], self.random_state()
        try:
            function()
        finally:
            for each, copy in zip(self.buffers, before, strict=True):
                each.copy_(copy)
            self.set_random_state(random)
        self.made += 1
        number = self.made
        self._alive.add(number)

        def replay() -> None:
            assert number in self._alive, "this recording was released"
            self.replayed += 1
            function()

        return replay

    def release(self) -> None:
        self.released += 1
        self._alive.clear()

    def is_tight(self) -> bool:
        return self.tight

    def random_state(self) -> torch.Tensor:
        return torch.get_rng_state()

    def set_random_state(self, state: torch.Tensor) -> None:
        torch.set_rng_state(state)
