"""What is asked of torch.cuda around a capture, with a stand-in for it: the order of calls, and what a failed capture leaves."""

from __future__ import annotations

import contextlib

import pytest
import torch

from sushi_research.fast import graphs as module
from sushi_research.fast.graphs import ROOM, CudaGraphs


class Stream:
    def __init__(self, name="side", *_):
        self.name = name

    def wait_stream(self, other):
        pass


class Graph:
    """As torch's: it has a pool once its capture has ended, and gives it back when it is reset."""

    def __init__(self, cuda):
        self.cuda, self.ended = cuda, False

    def pool(self):
        if not self.ended:
            raise RuntimeError("Called CUDAGraph::pool() without a preceding successful capture.")
        return self.in_pool

    def replay(self):
        self.cuda.calls.append("replay")

    def reset(self):
        if self.ended:
            self.cuda.users[self.in_pool] -= 1
        self.ended = False


class Generator:
    def __init__(self):
        self.capturing = False

    def clone_state(self):
        return Generator()

    def graphsafe_set_state(self, state):
        self.capturing = state.capturing


class FakeCuda:
    """Streams, pools with their number of users, and a capture that behaves as those of torch 2.11 and 2.13 when it fails."""

    def __init__(self, monkeypatch):
        self.calls, self.users, self.filling, self.filling_pinned = [], {}, None, set()
        self.main, self.pools, self.free, self.reserved = Stream("main"), 0, 2**40, 0
        self.current, self.fail_at_end = self.main, False
        self.default_generators = (Generator(),)
        for name in ("graph_pool_handle", "graph", "stream", "current_stream", "memory_reserved", "mem_get_info"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(module, "_side_stream", lambda device: Stream())
        monkeypatch.setattr(module, "_FAILED", [])
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Graph(self))
        monkeypatch.setattr(torch.cuda, "default_generators", self.default_generators)
        for name in ("synchronize", "empty_cache"):
            monkeypatch.setattr(torch.cuda, name, lambda *_, name=name: self.calls.append(name))
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.end, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", self.release, raising=False)

    def graph_pool_handle(self):
        self.pools += 1
        return (0, self.pools)

    def current_stream(self, device=None):
        return self.current

    def memory_reserved(self, device):
        return self.reserved

    def mem_get_info(self, device):
        return self.free, 2**40

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        assert capture_error_mode == "thread_local" and stream.name == "side"
        assert self.users.get(pool) != 0, "torch refuses a pool that had users and has none"
        assert pool not in self.filling_pinned, "beginAllocateToPool: already recording to mempool_id"
        self.users[pool] = self.users.get(pool, 0) + 1
        self.filling_pinned.add(pool)
        self.filling, self.current, self.default_generators[0].capturing = pool, stream, True
        graph.in_pool = self.filled = pool
        try:
            yield  # torch does not bring anything back if the block, or the end of the capture, fails
        finally:
            if self.fail_at_end:
                raise RuntimeError("operation failed due to a previous error during capture")
        self.filling_pinned.remove(pool)
        self.filling, self.current, self.default_generators[0].capturing = None, self.main, False
        graph.ended = True
        self.reserved += 2**30

    def end(self, device, pool):
        if self.filling != pool:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.filling = None

    def release(self, device, pool):
        self.users[pool] -= 1
        assert self.users[pool] >= 0


@pytest.fixture
def cuda(monkeypatch):
    return FakeCuda(monkeypatch)


def test_all_graphs_are_in_one_pool_until_they_are_released(cuda):
    graphs, ran = CudaGraphs(torch.device("cuda")), []
    replays = [graphs.capture(lambda: ran.append(cuda.current.name)) for _ in range(2)]
    assert ran == ["side", "side"] and cuda.users == {(0, 1): 2} and cuda.current is cuda.main
    replays[0]()
    assert cuda.calls[-1] == "replay"
    graphs.release()
    assert cuda.users == {(0, 1): 0} and cuda.calls[-1] == "empty_cache"
    graphs.capture(lambda: None)
    assert cuda.users == {(0, 1): 0, (0, 2): 1}


def test_the_run_before_a_capture_is_on_the_same_stream(cuda):
    graphs, ran = CudaGraphs(torch.device("cuda")), []
    graphs.warm_up(lambda: ran.append(cuda.current.name))
    with pytest.raises(ZeroDivisionError):
        graphs.warm_up(lambda: 1 / 0)
    assert ran == ["side"] and cuda.current is cuda.main


@pytest.mark.parametrize("earlier", [0, 1])
@pytest.mark.parametrize("fails", ["in the step", "at its end"])
def test_a_capture_that_fails_leaves_torch_as_it_was(cuda, earlier, fails):
    graphs = CudaGraphs(torch.device("cuda"))
    for _ in range(earlier):
        graphs.capture(lambda: None)
    cuda.fail_at_end = fails == "at its end"
    with pytest.raises((RuntimeError, ZeroDivisionError)):
        graphs.capture((lambda: None) if cuda.fail_at_end else (lambda: 1 / 0))
    cuda.fail_at_end = False
    assert cuda.current is cuda.main and cuda.filling is None and not cuda.default_generators[0].capturing
    assert cuda.users == {(0, 1): earlier}
    graphs.release()
    graphs.capture(lambda: None)
    assert cuda.users == {(0, 1): 0, cuda.filled: 1} and cuda.filled != (0, 1)


def test_the_error_of_a_capture_is_that_of_the_step_and_not_that_of_its_end(cuda):
    cuda.fail_at_end = True
    with pytest.raises(ZeroDivisionError):
        CudaGraphs(torch.device("cuda")).capture(lambda: 1 / 0)


def test_memory_is_tight_where_less_is_free_than_the_graphs_hold_or_a_picture_needs(cuda):
    graphs = CudaGraphs(torch.device("cuda"))
    cuda.free = 0
    assert not graphs.is_tight()  # there is nothing to release
    for _ in range(5):
        graphs.capture(lambda: None)
    for free, tight in ((5 * 2**30, False), (5 * 2**30 - 1, True)):
        cuda.free = free
        assert graphs.is_tight() == tight
    graphs.release()
    graphs.capture(lambda: None)
    cuda.free = ROOM - 1
    assert graphs.is_tight()
