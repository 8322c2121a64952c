"""CUDA graphs of a small step: many shapes in one pool, releasing it, and captures that fail."""

from __future__ import annotations

import gc

import pytest
import torch
from made_batches import batch_of
from torch import nn

from sushi_research.fast.graphs import CudaGraphs
from sushi_research.fast.recording import Recorder, StepBuffers

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


class Case:
    """A layer with dropout that is trained on the latents of a batch; `within` is called in each step."""

    def __init__(self, **options) -> None:
        torch.manual_seed(0)
        self.layer = nn.Sequential(nn.Linear(24, 4096), nn.Dropout(0.3), nn.Linear(4096, 24)).cuda()
        self.gradient = torch.zeros(sum(each.numel() for each in self.layer.parameters()), device="cuda")
        self.losses, self.sums = torch.zeros(64, device="cuda"), torch.zeros(1, device="cuda")
        self.within, self.lines = lambda batch: None, []
        buffers = StepBuffers([self.gradient], self.losses, [self.sums], self.discard, lambda: None)
        self.graphs = CudaGraphs(torch.device("cuda"))
        self.recorder = Recorder(self.step, buffers, self.graphs, say=self.lines.append, **options)

    def discard(self) -> None:
        for each in self.layer.parameters():
            each.grad = None

    def step(self, batch) -> None:
        self.within(batch)
        losses = (self.layer(batch.mean.flatten(2)) - batch.normal("noise").flatten(2)).square().flatten(1).mean(1)
        losses.sum().backward()
        with torch.no_grad():
            self.losses[: len(batch)].copy_(losses)
            self.sums += losses.sum()
            self.gradient += torch.cat([each.grad.flatten() for each in self.layer.parameters()])
            self.discard()

    def run(self, batches) -> list[torch.Tensor]:
        for number, batch in enumerate(batches):
            torch.manual_seed(number)
            self.recorder(batch)
        return [each.cpu() for each in (self.gradient, self.losses, self.sums)]


def on_gpu(step: int, size: int):
    batch, device = batch_of(step, size), torch.device("cuda")
    moved = {
        name: getattr(batch, name).to(device) for name in ("mean", "std", "time_ids", "loss_weights", "to_base", "step")
    }
    text = {name: each.to(device) for name, each in batch.text.items()}
    prefetched = {name: each.to(device) for name, each in batch.prefetched.items()}
    return type(batch)(
        **moved, text=text, prefetched=prefetched, names=batch.names, keys=batch.keys, seed=batch.seed, device=device
    )


def require_close(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    # Sums of the same numbers; kernels that are not deterministic may add them in another order.
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def eager(batches) -> list[torch.Tensor]:
    return Case(most=0).run(batches)


def test_33_shapes_of_which_32_are_recorded():
    batches = [on_gpu(number, 33 - number % 33) for number in range(66)]
    case = Case()
    require_close(case.run(batches), eager(batches))
    assert len(case.lines) == 1 and "32 shapes of micro-batches are recorded" in case.lines[0]


def test_released_memory_is_free_and_the_recordings_come_back():
    batches = [on_gpu(number, 60 + number % 3) for number in range(9)]
    case = Case()
    case.run(batches[:3])
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    with_graphs = torch.cuda.memory_reserved()
    case.graphs.is_tight = lambda: True
    case.recorder.make_room()
    gc.collect()
    assert torch.cuda.memory_reserved() < with_graphs
    for each in (case.gradient, case.losses, case.sums):
        each.zero_()
    require_close(case.run(batches[3:]), eager(batches[3:]))
    assert case.lines == []


def test_after_a_capture_that_fails_all_else_works_as_before():
    """torch leaves the random generator and the allocator in the middle of a capture that fails."""
    case = Case()
    case.within = lambda batch: batch.mean.sum().item() if len(batch) == 2 else None
    batches = [on_gpu(number, 1 + number % 3) for number in range(9)]
    require_close(case.run(batches), eager(batches))
    assert len(case.lines) == 1 and "2 of 48x32 run unrecorded" in case.lines[0]
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    torch.randn(3, device="cuda")
    torch.cuda.empty_cache()
    del case
    gc.collect()
    torch.cuda.empty_cache()


def test_memory_that_runs_out_beside_a_recording_is_made_free():
    case, seen = Case(), []

    def within(batch):
        if len(batch) == 3 and not seen:
            seen.append(batch)
            torch.empty(2**50, dtype=torch.uint8, device="cuda")

    case.within = within
    batches = [on_gpu(number, 2 + number % 2) for number in range(6)]
    require_close(case.run(batches), eager(batches))
    assert seen and case.lines == []
