"""What a micro-batch costs at any shape: its FLOPs and the bytes that are alive at once, from one run without weights.

A model runs on the meta device, where a tensor has a shape and no numbers. The traced batch has prime numbers of samples, latent
rows, columns and tokens, which divide no width of the model. So the size of each tensor, and the FLOPs of each operation, show how
they depend on the shape: a tensor of 13 x 17 x 19 x 320 numbers has 320 for each sample and latent pixel. One run gives the cost of
every bucket and every batch size.

**FLOPs** are counted by torch's rule (torch.utils.flop_counter): matrix products, convolutions and attention, two for each
multiplication with its addition. The product that fused attention computes again in its backward pass is included, and so is what
gradient checkpointing computes again.

**Live bytes** are those of the storages that operations made, until nothing refers to them any more: what is saved for the backward
pass, the tensors in use, and new gradients. Not counted are what was there before (weights, adapter, optimizer state), the memory
that a kernel uses inside and gives back (workspaces), and what an allocator adds. Attention counts as a fused kernel, which keeps
no number for each pair of tokens.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from sushi_research.planning.live_bytes import LiveStorages
from sushi_research.planning.op_counts import FLOPS

# Candidates for the numbers of the traced batch. The widths of published models have no prime factor above 11.
_PRIMES = (13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73)
# Rows and columns of latents are multiples of this: the UNets halve the resolution at most three times.
STRIDE = 8


@dataclass(frozen=True)
class Shape:
    """The shape of a micro-batch: samples, rows and columns of the latents, and tokens of the text."""

    samples: int
    rows: int
    columns: int
    tokens: int

    def powers(self, exponents: np.ndarray) -> np.ndarray:
        """The products of powers of its four numbers, float64 [n], for `exponents` [n, 4]."""
        base = np.array([self.samples, self.rows / STRIDE, self.columns / STRIDE, self.tokens], np.float64)
        return np.prod(np.power(base, exponents), axis=1)


@dataclass(frozen=True)
class Cost:
    """FLOPs and live bytes of some operations, for every shape.

    `exponents` [n, 4] are those of samples, rows / 8, columns / 8 and tokens in n terms. `flops` [n] has the factor of each term,
    `alive` [m, n] those of the bytes at m moments, one of which is the peak at a given shape.
    """

    exponents: np.ndarray
    flops: np.ndarray
    alive: np.ndarray

    def flops_of(self, shape: Shape) -> float:
        """FLOPs of the operations at a shape."""
        return float(self.flops @ shape.powers(self.exponents))

    def peak_bytes(self, shape: Shape) -> float:
        """The most bytes that are alive at once at a shape."""
        return float((self.alive @ shape.powers(self.exponents)).max(initial=0))


def trace(run: Callable[[Shape], Any], parameters: Iterable[torch.Tensor]) -> Cost:
    """The cost of `run`, which is called once with a shape, and computes on the meta device with a model of these parameters."""
    known = list(parameters)  # kept, so that no new storage gets an address of theirs
    shape, primes = _shape_for(known)
    with _fused_attention(), _Tracer(known, primes) as tracer:
        result = run(shape)
    del result
    return tracer.cost()


def _shape_for(parameters: Iterable[torch.Tensor]) -> tuple[Shape, tuple[int, ...]]:
    """A shape whose numbers can be told from the model's widths, and the four primes in it."""
    widths = {width for parameter in parameters for width in parameter.shape}
    primes = [prime for prime in _PRIMES if all(width % prime for width in widths)][:4]
    assert len(primes) == 4, f"the widths of the model have nearly all of the factors {_PRIMES}"
    samples, rows, columns, tokens = primes
    return Shape(samples, rows * STRIDE, columns * STRIDE, tokens), (samples, rows, columns, tokens)


@contextlib.contextmanager
def _fused_attention() -> Iterator[None]:
    """A block in which attention on the meta device is one operation. Else it would compute a matrix of all pairs of tokens.

    It is replaced in torch's module, because a mode would not be active where checkpointing computes a block again.
    """

    def attention(query: Any, key: Any, value: Any, attn_mask: Any = None, **others: Any) -> torch.Tensor:
        assert not others.get("dropout_p"), others
        # That of a CPU also runs on the meta device. A causal one has the FLOPs of a whole one.
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return fused(query, key, value, is_causal=bool(others.get("is_causal")), attn_mask=attn_mask)[0]

    before = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = before


class _Tracer(TorchDispatchMode):
    """Counts FLOPs and live bytes by terms of the shape."""

    def __init__(self, known: list[torch.Tensor], primes: tuple[int, ...]) -> None:
        super().__init__()
        self._primes = primes
        self._terms: dict[tuple[int, ...], int] = {}
        self._divided: dict[int, tuple[int, int]] = {}
        self._flops: Counter[int] = Counter()
        self._changes: list[tuple[int, int]] = []  # (term, change of its factor)
        self._storages = LiveStorages(lambda size: self._changed(size, -1))
        for tensor in known:
            self._storages.add(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if formula := FLOPS.get(func.overloadpacket):
            term, factor = self._divide(int(formula(*args, **(kwargs or {}), out_val=result)))
            self._flops[term] += factor
        if not func.is_view:
            for tensor in tree_iter(result):
                if isinstance(tensor, torch.Tensor) and (size := self._storages.add(tensor)):
                    self._changed(size, 1)
        return result

    def _changed(self, size: int, sign: int) -> None:
        term, factor = self._divide(size)
        self._changes.append((term, sign * factor))

    def _divide(self, number: int) -> tuple[int, int]:
        """(the term that `number` belongs to, the factor that is left when it is divided by it)."""
        if number not in self._divided:
            left, exponents = number, [0] * len(self._primes)
            for place, prime in enumerate(self._primes):
                while left and left % prime == 0:
                    left //= prime
                    exponents[place] += 1
            self._divided[number] = self._terms.setdefault(tuple(exponents), len(self._terms)), left
        return self._divided[number]

    def cost(self) -> Cost:
        """What was counted."""
        changes = np.zeros((len(self._changes), len(self._terms)), np.int64)
        for row, (term, change) in zip(changes, self._changes, strict=True):
            row[term] = change
        flops = np.array([self._flops[term] for term in range(len(self._terms))], np.int64)
        exponents = np.array(list(self._terms), np.int64).reshape(-1, len(self._primes))
        return Cost(exponents, flops, _largest(changes.cumsum(axis=0)))


def _largest(rows: np.ndarray) -> np.ndarray:
    """Those of the rows [m, n] that no other row reaches in every column: only they can be the peak at some shape."""
    rows = np.unique(rows, axis=0)
    kept = np.empty((0, rows.shape[1]), rows.dtype)
    for row in rows[np.argsort(-rows.sum(axis=1), kind="stable")]:
        if not (kept >= row).all(axis=1).any():
            kept = np.vstack([kept, row])
    return kept
