"""The order of an epoch: the same permutation as ever, computed once, in time and memory that grow with the number of samples."""

import sys
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sushi_research.randomness import key
from sushi_research.training import sampler
from sushi_research.training.sampler import Sampler


def order_of_version_1(buckets, global_batch_size, seed, epoch):
    """The first version of the order, sample by sample. Recorded runs were trained in it, and go on in it."""
    n = len(buckets)
    rng = key(seed, "order", epoch)
    head = min((-epoch * n) % global_batch_size, n)
    members = {}
    for index in rng.permutation(n):
        members.setdefault(buckets[index], []).append(int(index))
    full, pool = [], []
    for indices in members.values():
        whole = len(indices) - len(indices) % global_batch_size
        full += [indices[start : start + global_batch_size] for start in range(0, whole, global_batch_size)]
        pool += indices[whole:]
    while len(pool) < head:
        pool += full.pop()
    rest = pool[head:]
    tail_length = len(rest) % global_batch_size
    body, tail = rest[: len(rest) - tail_length], rest[len(rest) - tail_length :]
    groups = full + [body[start : start + global_batch_size] for start in range(0, len(body), global_batch_size)]
    shuffled = [index for position in rng.permutation(len(groups)) for index in groups[position]]
    return pool[:head] + shuffled + tail


@settings(max_examples=300)
@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=60),
    st.integers(1, 20),
    st.integers(0, 3),
    st.integers(0, 9),
)
def test_the_order_is_that_of_the_first_version(buckets, global_batch_size, seed, epoch):
    n = len(buckets)
    indices, epochs = Sampler(np.array(buckets), global_batch_size, seed).stream(epoch * n, (epoch + 1) * n)
    assert indices.tolist() == order_of_version_1(buckets, global_batch_size, seed, epoch)
    assert set(epochs.tolist()) == {epoch}


def test_an_order_is_that_of_the_first_version_for_thousands_of_samples():
    buckets = np.random.default_rng(0).integers(0, 40, 5000)
    for epoch in range(3):
        found = sampler.epoch_order(buckets.astype(np.int32), 16, 1, epoch)
        assert found.tolist() == order_of_version_1(buckets.tolist(), 16, 1, epoch)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.integers(1, 20), st.integers(1, 5), st.integers(1, 9))
def test_micro_batches_are_counted_without_making_them(buckets, global_batch_size, batch_size, steps):
    found = Sampler(np.array(buckets), global_batch_size, 0)
    made = sum(len(found.micro_batches(step, batch_size)) for step in range(steps))
    assert found.count_micro_batches(steps, batch_size) == made


def python_calls(function) -> int:
    """How many functions, Python's and C's, are called by `function()`."""
    count = 0

    def note(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(before)
    return count


@pytest.mark.parametrize(
    "use",
    [
        lambda sampler: [sampler.step(step) for step in range(1, 200)],
        lambda sampler: sampler.count_micro_batches(500, 4),
    ],
    ids=["steps", "plan"],
)
def test_nothing_is_called_for_each_sample(monkeypatch, use):
    make, ordered, calls = sampler.epoch_order, [], []
    monkeypatch.setattr(sampler, "epoch_order", lambda *args: ordered.append(args[-1]) or make(*args))
    for n in (4000, 8000):
        found = Sampler(np.arange(n) % 7, 8, 0)
        found.step(0)
        calls.append(python_calls(lambda found=found: use(found)))
    assert ordered == [0, 0]  # once for each data set
    assert calls[0] == pytest.approx(calls[1], abs=20)  # the interpreter's own


def test_the_memory_of_a_sampler_is_that_of_two_epochs():
    found = Sampler(np.arange(200_000) % 7, 8, 0)
    tracemalloc.start()
    for epoch in range(4):
        found.stream(epoch * 200_000, epoch * 200_000 + 8)
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert kept < 2.5 * 4 * 200_000  # two orders of int32
