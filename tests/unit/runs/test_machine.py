"""The memory that a process can still take from a GPU."""

import pytest
import torch

from sushi_research.runs import machine


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of 80 bytes, of which 50 are free and 10 reserved by this process, and the part that the process is held to."""

    def part(index):
        assert type(index) is int, "torch refuses a device without an index"
        return 0.25

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (50, 80))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 10)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", part)


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_free_memory_is_that_of_the_part(gpu, device):
    assert machine.free_gpu_memory(torch.device(device)) == 80 * 0.25 - 10


def test_free_memory_with_a_torch_that_does_not_tell_the_part(gpu, monkeypatch):
    monkeypatch.delattr(torch.cuda, "get_per_process_memory_fraction")
    assert machine.free_gpu_memory(torch.device("cuda")) == 50
