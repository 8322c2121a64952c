"""Captures functions as CUDA graphs in one memory pool, and replays them."""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable

import torch

from sushi_research.runs import machine

# Free memory that decoding a sample picture may take: the VAE in fp32 at 1024 px peaked at 3.2 GiB with its weights.
ROOM = 4 * 2**30

# Captures that failed. torch's allocator of pinned memory goes on asking them which streams are theirs, so they may not end.
_FAILED: list[torch.cuda.CUDAGraph] = []


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of all captures on a device, one for the process: cuBLAS never frees the workspaces of a stream."""
    return torch.cuda.Stream(device)


class CudaGraphs:
    """CUDA graphs of one device. They share a memory pool: what one leaves there, the next may overwrite.

    All run before their capture, and are captured, on one side stream: cuBLAS keeps a workspace per stream, which would else be
    made during a capture and hold on to the pool.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = torch.device("cuda", torch.cuda.current_device()) if device.index is None else device
        self._stream = _side_stream(self._device)
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._pool_bytes = 0

    def warm_up(self, function: Callable[[], None]) -> None:
        """Runs the function on the side stream: libraries load kernels and choose algorithms, which a capture refuses."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        try:
            with torch.cuda.stream(self._stream):
                function()
        finally:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        """Captures what the function launches, without running it, and returns the replay. Raises what a capture refuses.

        After an error call `release` before the next capture: the random generator has another state object then, which earlier
        graphs do not read, and torch's allocators may count the pool as being filled.

        "thread_local" lets other threads use the GPU meanwhile, such as NCCL's watchdog; the backward pass is captured with its
        stream.
        """
        graph, generator = torch.cuda.CUDAGraph(), torch.cuda.default_generators[self._device.index]
        state = generator.clone_state()
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        reserved = torch.cuda.memory_reserved(self._device)
        first: BaseException | None = None
        try:
            # The outer block brings the current stream back: the inner one does not, if the end of a capture fails.
            with (
                torch.cuda.stream(torch.cuda.current_stream(self._device)),
                torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
            ):
                try:
                    function()
                except BaseException as error:
                    first = error
                    raise
        except BaseException as error:
            # Until torch 2.12 the old one counts as capturing, and would refuse to draw.
            generator.graphsafe_set_state(state)
            self._abandon(graph)
            # The end of the capture may have failed too, with an error that does not say what was refused.
            raise (first or error) from None
        finally:
            first = None  # its traceback holds this frame, and tensors
        self._graphs.append(graph)
        self._pool_bytes += max(0, torch.cuda.memory_reserved(self._device) - reserved)
        return graph.replay

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """Brings torch's allocator back from a capture that failed: its pool would count as being filled, and stay in use."""
        try:
            graph.pool()
        except RuntimeError:  # the capture itself did not end
            # The first two are one function under its names in different versions of torch.
            for name in ("_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool", "_cuda_releasePool"):
                with contextlib.suppress(AttributeError, RuntimeError):
                    getattr(torch._C, name)(self._device.index, self._pool)
            _FAILED.append(graph)
        graph.reset()

    def release(self) -> None:
        """Drops all graphs and gives their memory back. Their replays must not be called any more."""
        torch.cuda.synchronize(self._device)
        for graph in self._graphs:
            graph.reset()
        self._graphs.clear()
        self._pool, self._pool_bytes = torch.cuda.graph_pool_handle(), 0
        gc.collect()
        torch.cuda.empty_cache()

    def is_tight(self) -> bool:
        """Whether the memory that is free beside the graphs may be too little for evaluating and sampling."""
        free = machine.free_gpu_memory(self._device)
        return bool(self._graphs) and free < max(self._pool_bytes, ROOM)

    def random_state(self) -> torch.Tensor:
        """The state of torch's generator on this device, which dropout draws from."""
        return torch.cuda.get_rng_state(self._device)

    def set_random_state(self, state: torch.Tensor) -> None:
        """Restores a state of `random_state`."""
        torch.cuda.set_rng_state(state, self._device)
