"""Chooses the samples of a step: exactly G (the global batch size), in micro-batches of one bucket each (rule 7, CONTRIBUTING.md).

The training data is an endless stream: epoch 0, then epoch 1, and so on, cut into steps of G samples. The order within an
epoch is a pure function of (seed, epoch, G, buckets). It contains every sample exactly once and is arranged so that as many
steps as possible have a single bucket. Only the tail of an epoch shares a step with the next epoch. The order does not depend
on the number of processes or on how G is split into batch size and accumulation, so neither changes what is learned.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from sushi_research.randomness import key


@dataclass(frozen=True)
class StepSample:
    """One sample of one step: its `index` in the list of samples, and its epoch."""

    index: int
    epoch: int


@dataclass(frozen=True)
class Sampler:
    """The endless stream of samples. `buckets` has one hashable per sample.

    The caller must sort the samples by content, so that renaming a file does not change the order.
    """

    buckets: tuple[Hashable, ...]
    global_batch_size: int
    seed: int

    def __post_init__(self) -> None:
        assert self.buckets and self.global_batch_size >= 1

    def step(self, step: int) -> list[StepSample]:
        """The G samples of step `step` (from 0), in stream order."""
        n, g = len(self.buckets), self.global_batch_size
        positions = [divmod(position, n) for position in range(step * g, (step + 1) * g)]
        orders = {epoch: _epoch_order(self.buckets, g, self.seed, epoch) for epoch in {epoch for epoch, _ in positions}}
        return [StepSample(int(orders[epoch][offset]), epoch) for epoch, offset in positions]

    def micro_batches(self, step: int, batch_size: int) -> list[list[StepSample]]:
        """The step's samples in same-bucket micro-batches of at most `batch_size`; buckets in order of first appearance."""
        by_bucket: dict[Hashable, list[StepSample]] = {}
        for sample in self.step(step):
            by_bucket.setdefault(self.buckets[sample.index], []).append(sample)
        return [
            samples[start : start + batch_size]
            for samples in by_bucket.values()
            for start in range(0, len(samples), batch_size)
        ]

    def share(self, step: int, batch_size: int, rank: int, world: int) -> list[list[StepSample]]:
        """The micro-batches of process `rank` of `world`. Each micro-batch, largest first, goes to the least loaded process."""
        loads = [0] * world
        mine = []
        for micro_batch in sorted(self.micro_batches(step, batch_size), key=len, reverse=True):
            process = loads.index(min(loads))
            loads[process] += len(micro_batch)
            if process == rank:
                mine.append(micro_batch)
        return mine


@lru_cache(maxsize=4)
def _epoch_order(buckets: tuple[Hashable, ...], global_batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of range(N), arranged for steps of `global_batch_size` samples.

    Each bucket is shuffled and cut into full groups of `global_batch_size`; the remaining samples of all buckets form a
    pool. If the previous epochs end in the middle of a step, the first `head` samples of the pool complete that step. The
    rest of the pool is cut into groups, which are shuffled together with the full ones. The last, partial group is the
    tail. Head and tail lengths depend only on the counts, so no epoch needs the order of another.
    """
    n = len(buckets)
    rng = key(seed, "order", epoch)
    head = min((-epoch * n) % global_batch_size, n)
    members: dict[Hashable, list[int]] = {}
    for index in rng.permutation(n):
        members.setdefault(buckets[index], []).append(int(index))
    full, pool = [], []
    for indices in members.values():
        whole = len(indices) - len(indices) % global_batch_size
        full += [indices[start : start + global_batch_size] for start in range(0, whole, global_batch_size)]
        pool += indices[whole:]
    # The pool can be smaller than `head` (buckets that divide evenly): then break up full groups.
    while len(pool) < head:
        pool += full.pop()
    rest = pool[head:]
    tail_length = len(rest) % global_batch_size
    body, tail = rest[: len(rest) - tail_length], rest[len(rest) - tail_length :]
    groups = full + [body[start : start + global_batch_size] for start in range(0, len(body), global_batch_size)]
    shuffled = [index for position in rng.permutation(len(groups)) for index in groups[position]]
    order = np.array(pool[:head] + shuffled + tail, dtype=np.int64)
    assert len(order) == n
    return order
