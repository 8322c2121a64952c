"""The parts of a result file that every timing of two steps has."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from statistics import median
from typing import Any

import torch

from benchmarking import paired_timing
from sushi_research.runs import machine

# The first steps, whose losses are compared.
PARITY_STEPS = 4


def timings(rounds: Sequence[paired_timing.Round]) -> dict[str, Any]:
    """What the kept rounds say of the two steps."""
    kept = [done for done in rounds if done.status == "kept"]
    return {
        "time": asdict(paired_timing.compare_timings([done.a for done in kept], [done.b for done in kept])),
        "cpu_time": asdict(paired_timing.compare_timings([done.a_cpu for done in kept], [done.b_cpu for done in kept])),
        "seconds_per_step": {"a": median(done.a for done in kept), "b": median(done.b for done in kept)},
        "discarded": sum(done.status == "busy" for done in rounds),
    }


def parity(a: Sequence[float], b: Sequence[float]) -> dict[str, Any]:
    """How far the losses of the first steps differ."""
    largest = max(abs(one - other) / abs(one) for one, other in zip(a, b, strict=True))
    return {"steps": PARITY_STEPS, "largest_relative_difference": largest}


def settings(arguments: argparse.Namespace, calls: int) -> dict[str, Any]:
    """Those of the timing."""
    names = ("warmup", "block_seconds", "max_pressure")
    return {"calls_per_block": calls, **{name: getattr(arguments, name) for name in names}}


def circumstances(device: str, rounds: Sequence[paired_timing.Round]) -> dict[str, Any]:
    """Where and when it was measured, and every round."""
    return {
        "libraries": machine.library_versions(),
        "python": platform.python_version(),
        "machine": {
            "device": machine.device_name(device),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "platform": platform.platform(),
        },
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "rounds": [asdict(done) for done in rounds],
    }
