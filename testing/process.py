"""One process of fault injection: a training script's `main` with an injected fault.

The fork server that creates the tests' processes imports this module (preloaded.py), so the libraries below are loaded only once. A
process that runs the real script then starts in a fraction of a second, and is a separate process that can be killed.
"""

from __future__ import annotations

import ctypes
import importlib.util
import io
import itertools
import os
import resource
import secrets
import signal
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Preloaded for the fork server: everything that a run imports.
import bitsandbytes  # noqa: F401
import datasets  # noqa: F401
import matplotlib.figure  # noqa: F401
import pyarrow.parquet  # noqa: F401
from diffusers import (  # noqa: F401
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig  # noqa: F401
from PIL import Image
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer  # noqa: F401

from sushi_research import models
from sushi_research.config.process import run_main
from sushi_research.reports import run_plots, training_curves
from sushi_research.training import evaluating, resume  # noqa: F401
from sushi_research.training import run as training_run  # noqa: F401
from testing.forked_scripts import become_a_program


@dataclass(frozen=True)
class Order:
    """What a process runs: the script, its settings by dotted key, its environment, and the injected fault.

    `die_at`: it sends itself SIGKILL right before its n-th sync or rename of a file, counted from 1. `file_limit`: maximum size of
    a file in bytes. `count`: the file to which it writes how often it synced and renamed. `traced`: it waits until strace has
    attached, and the names of its temporary files are not random.
    """

    script: Path
    architecture: str
    settings: dict[str, Any]
    log: Path
    environment: dict[str, str] = field(default_factory=dict)
    die_at: int = 0
    file_limit: int = 0
    count: Path | None = None
    traced: bool = False


def run(order: Order) -> None:
    """Target of the process; it ends with the script's own exit status unless it is killed."""
    os.environ.update(order.environment, ACCELERATE_USE_CPU="true", HF_HUB_OFFLINE="1")
    become_a_program(order.log, order.log)
    # Curves are drawn in memory and take a third of a tiny run. The page and loss.png are written all the same.
    run_plots.panel = training_curves.panel = lambda *_: _point()
    writes = _watch_writes(order.die_at)
    if order.file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order.file_limit, order.file_limit))
    if order.traced:
        _number_names()
        _wait_for_strace()
    try:
        run_main(load(order.script).main, configure(order.architecture, order.settings))
    finally:
        if order.count is not None:
            order.count.write_text(str(len(writes)))


def _point() -> bytes:
    """A PNG file of one point."""
    data = io.BytesIO()
    Image.new("RGB", (1, 1)).save(data, "PNG")
    return data.getvalue()


def load(script: Path) -> Any:
    """A training script as a module."""
    spec = importlib.util.spec_from_file_location(script.stem, script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def configure(architecture: str, settings: dict[str, Any]) -> Any:
    """The config made from settings by dotted key."""
    nested: dict[str, Any] = {}
    for key, value in settings.items():
        section, _, name = key.partition(".")
        nested.setdefault(section, {})[name] = value
    return models.ARCHITECTURES[architecture].config_class()(**nested)


def _number_names() -> None:
    """Makes the random parts of temporary names numbers that count up, so that two runs use the same names."""
    numbers = itertools.count(1)
    secrets.token_hex = lambda count=32: f"{next(numbers):0{2 * count}x}"
    uuid.uuid4 = lambda: uuid.UUID(int=next(numbers))


def _wait_for_strace() -> None:
    """Waits until a tracer has attached to this process; ends the process after a minute without one."""
    # Where a process may trace only its children (ptrace_scope 1), it must be allowed to trace this one: PR_SET_PTRACER, any.
    ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(-1), 0, 0, 0)
    until = time.monotonic() + 60
    while "TracerPid:\t0\n" in Path("/proc/self/status").read_text():
        if time.monotonic() > until:
            raise SystemExit("no tracer has attached")
        time.sleep(0.01)


def _watch_writes(die_at: int) -> list[str]:
    """Records calls of fsync, replace and rename, and kills the process right before call number `die_at` (0: never)."""
    seen: list[str] = []

    def watch(name: str) -> Any:
        call = getattr(os, name)

        def watched(*arguments: Any, **options: Any) -> Any:
            seen.append(name)
            if len(seen) == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        return watched

    for name in ("fsync", "replace", "rename"):
        setattr(os, name, watch(name))
    return seen
