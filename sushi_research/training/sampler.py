"""Which samples a step sees: exactly G of them, in same-bucket micro-batches (design rule 7).

The training data is one endless stream: the order of epoch 0, then that of epoch 1, and so on, cut into steps of G.
The order of an epoch is a pure function of (seed, epoch, G, buckets): every sample stands in it exactly once, and it is
arranged so that as many steps as possible hold a single bucket. Only the tail of an epoch shares a step with the next.
Neither the number of processes nor the split of G into batch and accumulation enters, so neither changes what is learned.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from sushi_research.randomness import key


@dataclass(frozen=True)
class StepSample:
    """One sample of one step: `index` into the list of samples, and the epoch it is drawn for."""

    index: int
    epoch: int


@dataclass(frozen=True)
class Sampler:
    """The endless stream over samples whose buckets are given, one hashable per sample.

    The caller sorts the samples by content, so that renaming a file moves nothing.
    """

    buckets: tuple[Hashable, ...]
    global_batch_size: int
    seed: int

    def __post_init__(self) -> None:
        assert self.buckets and self.global_batch_size >= 1

    def step(self, step: int) -> list[StepSample]:
        """The G draws of step `step` (from 0), bucket by bucket where the epoch's order has them so."""
        n, g = len(self.buckets), self.global_batch_size
        places = [divmod(position, n) for position in range(step * g, (step + 1) * g)]
        orders = {epoch: _epoch_order(self.buckets, g, self.seed, epoch) for epoch in {epoch for epoch, _ in places}}
        return [StepSample(int(orders[epoch][offset]), epoch) for epoch, offset in places]

    def micro_batches(self, step: int, batch_size: int) -> list[list[StepSample]]:
        """The step's draws as same-bucket micro-batches of at most `batch_size`; buckets in order of first appearance."""
        by_bucket: dict[Hashable, list[StepSample]] = {}
        for sample in self.step(step):
            by_bucket.setdefault(self.buckets[sample.index], []).append(sample)
        return [
            samples[start : start + batch_size]
            for samples in by_bucket.values()
            for start in range(0, len(samples), batch_size)
        ]

    def share(self, step: int, batch_size: int, rank: int, world: int) -> list[list[StepSample]]:
        """The micro-batches of the step that process `rank` of `world` runs: largest first, to the least loaded process."""
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
    """A permutation of range(N), arranged for steps of `group`.

    Each bucket, shuffled, is cut into full groups; what is left over of every bucket goes into a pool, bucket by bucket.
    The epoch starts in the middle of a step when its predecessors did not end on one: `head` samples of the pool fill
    that step. The pool's other samples are cut into groups and shuffled among the full ones; the last, partial group is
    the tail. Head and tail follow from the counts alone, so no epoch has to know another's order.
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
    # The pool of a lucky data set can be smaller than the step that must be completed: break up full groups for it.
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
