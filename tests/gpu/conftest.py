"""Fixtures of the tests that need a GPU. Together they take at most 90 seconds there."""

from __future__ import annotations

import pytest
import torch
from script_runs import Trainer


@pytest.fixture
def gpu_trainer(architecture, bases, photos, tmp_path_factory, tmp_path):
    """Runs the script of an architecture on the GPU, with a cache that all tests share."""
    cache = tmp_path_factory.getbasetemp() / "gpu-cache"
    return Trainer(architecture, bases[architecture], photos, tmp_path / "runs", cache)


@pytest.fixture(autouse=True)
def as_it_was():
    """Deterministic kernels, which a run asks for, are not those of the next test."""
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True
