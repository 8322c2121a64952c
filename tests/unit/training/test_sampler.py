"""A step is exactly G samples; an epoch is every sample once; batch, accumulation and processes change nothing."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sushi_research.training.sampler import Sampler

buckets_strategy = st.lists(st.integers(0, 6), min_size=1, max_size=40).map(np.array)


def ids(letters: str) -> np.ndarray:
    """A bucket for each letter."""
    return np.frombuffer(letters.encode(), np.uint8) - ord("a")


def stream(sampler: Sampler, length: int):
    steps = -(-length // sampler.global_batch_size)
    return [sample for step in range(steps) for sample in sampler.step(step)][:length]


@settings(max_examples=150, deadline=None)
@given(buckets=buckets_strategy, global_batch_size=st.integers(1, 50), seed=st.integers(0, 5))
def test_every_epoch_holds_every_sample_once(buckets, global_batch_size, seed):
    n = len(buckets)
    samples = stream(Sampler(buckets, global_batch_size, seed), 4 * n)
    for epoch in range(4):
        part = samples[epoch * n : (epoch + 1) * n]
        assert sorted(sample.index for sample in part) == list(range(n))
        assert {sample.epoch for sample in part} == {epoch}


@settings(max_examples=150, deadline=None)
@given(
    buckets=buckets_strategy,
    batch=st.integers(1, 4),
    accumulation=st.integers(1, 4),
    world=st.integers(1, 4),
    step=st.integers(0, 8),
)
def test_processes_share_exactly_the_step_in_same_bucket_micro_batches(buckets, batch, accumulation, world, step):
    sampler = Sampler(buckets, batch * accumulation * world, seed=1)
    shares = [sampler.share(step, batch, rank, world) for rank in range(world)]
    assert Counter(d for share in shares for micro in share for d in micro) == Counter(sampler.step(step))
    assert all(shares), (
        "every process has work: G samples in micro-batches of at most `batch` are at least `world` many"
    )
    for share in shares:
        for micro in share:
            assert 1 <= len(micro) <= batch
            assert len({buckets[sample.index] for sample in micro}) == 1


def test_the_split_of_g_does_not_change_the_step():
    buckets = ids("aaabbbbbccd")
    assert Sampler(buckets, 4, 0).step(3) == Sampler(buckets, 2 * 2, 0).step(3)
    whole = Sampler(buckets, 4, 0)
    for step in range(6):
        split = [sample for micro in whole.micro_batches(step, 2) for sample in micro]
        assert Counter(split) == Counter(whole.step(step))


def test_full_buckets_make_full_steps():
    # 8 of one bucket and 4 of another in steps of 4: three steps, each of a single bucket, in every aligned epoch.
    sampler = Sampler(ids("aaaaaaaabbbb"), 4, 3)
    for step in range(9):
        assert len(sampler.micro_batches(step, 4)) == 1


def test_epochs_differ_and_seeds_differ():
    buckets = ids("a" * 30)
    order = lambda seed, epoch: [d.index for d in stream(Sampler(buckets, 5, seed), 60)[30 * epoch : 30 * epoch + 30]]  # noqa: E731
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)
    assert order(0, 0) == order(0, 0)


def test_a_step_larger_than_the_data_spans_epochs():
    sampler = Sampler(ids("aba"), 8, 0)
    assert Counter(sample.epoch for sample in sampler.step(0)) == {0: 3, 1: 3, 2: 2}
    assert Counter(sample.epoch for sample in sampler.step(1)) == {2: 1, 3: 3, 4: 3, 5: 1}


@pytest.mark.parametrize("buckets", ["a" * 64, "abcd" * 16])
def test_the_order_is_shuffled_not_sorted(buckets):
    first = [sample.index for sample in stream(Sampler(ids(buckets), 4, 0), 64)]
    displaced = sum(abs(position - index) for position, index in enumerate(first)) / 64
    assert displaced > 10  # a uniform permutation of 64 moves an element by 21.3 on average


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_largest_micro_batch_is_that_of_the_largest_area(batch_size):
    buckets, areas = np.array([0] * 9 + [1] * 4 + [2] * 2), np.array([1, 2, 3])
    sampler = Sampler(buckets, 6, seed=1)
    for start, stop in ((0, 1), (0, 5), (3, 9)):
        all_of_them = [
            (step, micro_batch)
            for step in range(start, stop)
            for micro_batch in sampler.micro_batches(step, batch_size)
        ]
        most = max(len(each) * areas[buckets[each[0].index]] for _, each in all_of_them)
        step, found = sampler.largest_micro_batch(start, stop, batch_size, areas)
        assert (step, found) in all_of_them and len(found) * areas[buckets[found[0].index]] == most
