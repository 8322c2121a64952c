"""The order of the samples within an epoch (training/sampler.py says what it is for)."""

from __future__ import annotations

import numpy as np

from sushi_research.randomness import key


def epoch_order(buckets: np.ndarray, global_batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of range(N), int32 [N], arranged for steps of `global_batch_size` samples.

    `buckets` [N] number the samples' buckets from 0.

    Each bucket is shuffled and cut into full groups of `global_batch_size`; the remaining samples of all buckets form a
    pool. If the previous epochs end in the middle of a step, the first `head` samples of the pool complete that step. The
    rest of the pool is cut into groups, which are shuffled together with the full ones. The last, partial group is the
    tail. Head and tail lengths depend only on the counts, so no epoch needs the order of another.
    """
    n, g = len(buckets), global_batch_size
    rng = key(seed, "order", epoch)
    head = min((-epoch * n) % global_batch_size, n)
    shuffled = rng.permutation(n).astype(np.int32)
    # Sort by bucket, the buckets by their first appearance: of an index that is assigned several times, the last value stays.
    first = np.full(int(buckets.max()) + 1, n)
    first[buckets[shuffled[::-1]]] = np.arange(n - 1, -1, -1)
    ranks = np.argsort(np.argsort(first)).astype(np.min_scalar_type(len(first)))  # 16 bits are sorted in linear time
    rank = ranks[buckets[shuffled]]
    members = shuffled[np.argsort(rank, kind="stable")]
    counts = np.bincount(rank)
    place = np.arange(n) - np.repeat(np.cumsum(counts) - counts, counts)  # within its bucket
    is_full = place < np.repeat(counts // g * g, counts)
    full, pool = members[is_full].reshape(-1, g), members[~is_full]
    # The pool can be smaller than `head` (buckets that divide evenly): then break up full groups, the last one first.
    broken = max(0, -(-(head - len(pool)) // g))
    pool = np.concatenate([pool, full[len(full) - broken :][::-1].ravel()])
    full, rest = full[: len(full) - broken], pool[head:]
    body, tail = rest[: len(rest) // g * g], rest[len(rest) // g * g :]
    groups = np.concatenate([full, body.reshape(-1, g)])
    order = np.concatenate([pool[:head], groups[rng.permutation(len(groups))].ravel(), tail])
    assert len(order) == n
    return order
