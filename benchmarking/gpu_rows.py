"""The functions that measure the rows of `benchmarking.gpu`. Each gets the folder of the bases and the seconds of its steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarking.gpu_subject import REAL, SMALL, Step, Subject, gradients, memory, run_steps
from sushi_research.training.run import quiet_libraries
from testing.full_base import COMPONENTS, save_unet
from testing.real_configs import NARROW_UNETS
from testing.rerun import Rerun

# Products of SDXL's layers at 1024 x 1024: rows, inputs, outputs.
SHAPES = ((4096, 640, 640), (1024, 1280, 1280), (1024, 1280, 10240), (4096, 1280, 10240))


def probe(bases: Path, seconds: float, *, dry: bool) -> dict[str, Any]:
    """What the card reaches by itself: a large product in bf16, a copy, and products of SDXL's shapes (TFLOP/s; launches count)."""
    sizes, device = (SMALL, "cpu") if dry else (REAL, "cuda")
    side = sizes.matrix
    found: dict[str, Any] = {}
    for name, shape in {"matmul": (side,) * 3, **{"x".join(map(str, each)): each for each in SHAPES}}.items():
        rows, inputs, outputs = (min(size, side) for size in shape)
        a = torch.randn(rows, inputs, device=device, dtype=torch.bfloat16)
        b = torch.randn(inputs, outputs, device=device, dtype=torch.bfloat16)
        found[f"{name}_tflops"] = 2 * rows * inputs * outputs / _seconds(lambda a=a, b=b: a @ b, device) / 1e12
    source = torch.empty(2**20 if dry else 2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found["copy_tb_per_second"] = 2 * source.numel() / _seconds(lambda: target.copy_(source), device) / 1e12
    return found | memory()


def _seconds(function: Callable[[], Any], device: str, calls: int = 30) -> float:
    """Seconds of one call, of many in a row."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    for _ in range(3):
        function()
    wait()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    wait()
    return (time.perf_counter() - start) / calls


def train(
    bases: Path, seconds: float, *, dry: bool, architecture: str, storage: str = "compute", **how: Any
) -> dict[str, Any]:
    """Whole steps of the training script for so many seconds."""
    subject = _subject(bases, architecture, Step(**how), dry, storage)
    found = run_steps(subject, seconds)
    subject.close()
    return found | {"architecture": architecture, "storage": storage, **how}


def equality(bases: Path, seconds: float, *, dry: bool, architecture: str) -> dict[str, Any]:
    """Whether recorded micro-batches give the eager ones' gradients bit for bit, with deterministic kernels.

    Without deterministic kernels the largest relative difference is given, beside that of two eager runs.
    """
    found: dict[str, Any] = {"architecture": architecture}
    for deterministic in (True, False):
        torch.use_deterministic_algorithms(deterministic)
        subject = _subject(bases, architecture, Step(), dry)
        batches = [subject.batch(number) for number in range(3)]
        eager, again = (gradients(subject, batches, subject.micro_batch) for _ in range(2))
        recorded = gradients(subject, batches, subject.recorder)
        found["path"] = subject.path
        name = "deterministic" if deterministic else "default"
        found[f"{name}_recorded_is_eager"] = all(map(torch.equal, recorded, eager))
        found[f"{name}_recorded_differs"] = _difference(recorded, eager)
        found[f"{name}_eager_differs"] = _difference(again, eager)
        subject.close()
    torch.use_deterministic_algorithms(False)
    return found


def _difference(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    pairs = zip(found, expected, strict=True)
    return max(float((one - other).norm() / other.norm()) for one, other in pairs)


def _subject(bases: Path, architecture: str, how: Step, dry: bool, storage: str = "compute") -> Subject:
    quiet_libraries()
    torch.backends.cudnn.allow_tf32 = False  # as run.start_job
    folder = bases / architecture
    if not (folder / "made").exists():
        config = NARROW_UNETS[architecture] if dry else COMPONENTS[architecture]["unet"]
        save_unet(folder, config, device="cpu" if dry else "cuda")
        (folder / "made").touch()
    graphs = (lambda buffers: Rerun(buffers.all)) if dry else None
    return Subject(architecture, folder, how, SMALL if dry else REAL, storage, graphs)


FUNCTIONS: dict[str, Callable[..., dict[str, Any]]] = {"probe": probe, "train": train, "equality": equality}
