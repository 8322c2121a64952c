"""Facts of this machine: its processor and GPU, memory, torch's threads, and the versions of the libraries.

For a run's provenance, its plan and scripts/doctor.py. Torch is imported only where a fact needs it.
"""

from __future__ import annotations

import contextlib
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from sushi_research.runs.code import LIBRARIES


def hardware(device: str) -> dict[str, Any]:
    """CPU cores, torch's threads (a CPU rounds differently with another number), memory in GiB, and GPU memory in GiB (None
    without a GPU). `device` is that of a process ("cpu", "cuda:0")."""
    import torch

    gpu = None
    if device.startswith("cuda"):
        gpu = round(torch.cuda.get_device_properties(device).total_memory / 2**30, 1)
    memory = round(psutil.virtual_memory().total / 2**30, 1)
    threads = torch.get_num_threads()
    return {"cpus": os.cpu_count(), "threads": threads, "memory_gib": memory, "gpu_memory_gib": gpu}


def free_gpu_memory(device: Any) -> int:
    """Bytes that this process can still take from the GPU: those that are free, or less if train.memory holds it to a part."""
    import torch

    free, total = torch.cuda.mem_get_info(device)
    # Older versions of torch do not tell the part. What adapts then runs out of memory first, and takes less.
    part_of = getattr(torch.cuda, "get_per_process_memory_fraction", lambda index: 1.0)
    # That function refuses a device without an index.
    index = torch.device(device).index
    part = part_of(torch.cuda.current_device() if index is None else index)
    return min(free, int(total * part) - torch.cuda.memory_reserved(device))


def device_name(device: str) -> str:
    """The model name of the GPU or CPU of `device`."""
    if device != "cpu":
        import torch

        if device.startswith("cuda"):
            return torch.cuda.get_device_name(device)
        return device
    cpuinfo = Path("/proc/cpuinfo")  # platform.processor() is empty on most Linux systems
    with contextlib.suppress(OSError):  # Linux only
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def why_no_gpu() -> str:
    """Why torch uses no GPU on this machine, and what to do; for a machine on which it finds none."""
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is a build for CPUs (on a machine with a GPU, install the build for it: pytorch.org)"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return f"CUDA_VISIBLE_DEVICES is {visible!r}, which hides every GPU (unset it to use one)"
    return (
        f"torch {torch.__version__} finds no GPU (if this machine has one, `nvidia-smi` must show it, and its driver must be new "
        "enough for this torch)"
    )


def library_versions() -> dict[str, str | None]:
    """Installed versions by name, without importing the libraries; None if not installed."""
    found: dict[str, str | None] = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found
