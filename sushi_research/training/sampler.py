"""Chooses the samples of a step: exactly G (the global batch size), in micro-batches of one bucket each (rule 7, CONTRIBUTING.md).

The training data is an endless stream: epoch 0, then epoch 1, and so on, cut into steps of G samples. The order within an
epoch is a pure function of (seed, epoch, G, buckets). It contains every sample exactly once and is arranged so that as many
steps as possible have a single bucket. Only the tail of an epoch shares a step with the next epoch. The order does not depend
on the number of processes or on how G is split into batch size and accumulation, so neither changes what is learned.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from sushi_research.data.epoch_order import epoch_order

# The orders of so many epochs are kept, 4 bytes a sample: a step can have samples of two, and the next step is prefetched.
KEPT_EPOCHS = 2


@dataclass(frozen=True)
class StepSample:
    """One sample of one step: its `index` in the list of samples, and its epoch."""

    index: int
    epoch: int


class Sampler:
    """The endless stream of samples. `bucket_ids` [N] has the number of each sample's bucket, from 0.

    The caller must sort the samples by content, so that renaming a file does not change the order. An epoch's order is computed
    once, when a step first needs it.
    """

    def __init__(self, bucket_ids: np.ndarray, global_batch_size: int, seed: int) -> None:
        assert bucket_ids.ndim == 1 and len(bucket_ids) and global_batch_size >= 1
        self.bucket_ids, self.global_batch_size, self.seed = bucket_ids, global_batch_size, seed
        # From 0, so that each is an index; the order depends only on which samples share a bucket.
        self._buckets = np.unique(bucket_ids, return_inverse=True)[1].astype(np.int32)
        self._order = lru_cache(KEPT_EPOCHS)(lambda epoch: epoch_order(self._buckets, global_batch_size, seed, epoch))

    def stream(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """(indices, epochs), each [stop - start], of the samples at these positions of the stream."""
        epochs, offsets = np.divmod(np.arange(start, stop), len(self.bucket_ids))
        indices = np.empty(len(epochs), np.int64)
        for epoch in np.unique(epochs).tolist():
            inside = epochs == epoch
            indices[inside] = self._order(epoch)[offsets[inside]]
        return indices, epochs

    def step(self, step: int) -> list[StepSample]:
        """The G samples of step `step` (from 0), in stream order."""
        g = self.global_batch_size
        indices, epochs = self.stream(step * g, (step + 1) * g)
        return [StepSample(index, epoch) for index, epoch in zip(indices.tolist(), epochs.tolist(), strict=True)]

    def micro_batches(self, step: int, batch_size: int) -> list[list[StepSample]]:
        """The step's samples in same-bucket micro-batches of at most `batch_size`; buckets in order of first appearance."""
        by_bucket: dict[int, list[StepSample]] = {}
        for sample in self.step(step):
            by_bucket.setdefault(int(self.bucket_ids[sample.index]), []).append(sample)
        return [
            samples[start : start + batch_size]
            for samples in by_bucket.values()
            for start in range(0, len(samples), batch_size)
        ]

    def count_micro_batches(self, steps: int, batch_size: int) -> int:
        """How many micro-batches the first `steps` steps have."""
        buckets = self.bucket_ids[self.stream(0, steps * self.global_batch_size)[0]]
        places = np.arange(len(buckets)) // self.global_batch_size * (int(self.bucket_ids.max()) + 1) + buckets
        counts = np.unique(places, return_counts=True)[1]  # of each bucket in each step
        return int((-(-counts // batch_size)).sum())

    def largest_micro_batch(
        self, start: int, stop: int, batch_size: int, areas: np.ndarray
    ) -> tuple[int, list[StepSample]]:
        """(its step, its samples) of the micro-batch of the steps from `start` to `stop` - 1 that covers the largest area.

        `areas` [number of buckets] are those of one sample.
        """
        g = self.global_batch_size
        buckets = self.bucket_ids[self.stream(start * g, stop * g)[0]]
        places, counts = np.unique(np.arange(len(buckets)) // g * len(areas) + buckets, return_counts=True)
        step, bucket = divmod(
            int(places[np.argmax(np.minimum(counts, batch_size) * areas[places % len(areas)])]), len(areas)
        )
        found = [
            samples
            for samples in self.micro_batches(start + step, batch_size)
            if self.bucket_ids[samples[0].index] == bucket
        ]
        return start + step, max(found, key=len)

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
