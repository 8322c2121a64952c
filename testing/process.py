"""One process of a fault injection: a training script's `main`, with something that will go wrong in it.

It is imported by the fork server that the tests' processes come from: what is loaded here is loaded once, so a process that
runs the real script is there in a fraction of a second, and is a process of its own that can be killed.
"""

from __future__ import annotations

import importlib.util
import os
import resource
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Loaded for the fork server's sake, all that a run will import.
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
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer  # noqa: F401

from sushi_research import models
from sushi_research.config.command_line import run_main
from sushi_research.training import evaluating, resume  # noqa: F401
from sushi_research.training import run as training_run  # noqa: F401
from testing.forked_scripts import become_a_program


@dataclass(frozen=True)
class Order:
    """What a process runs: the script and its settings by dotted key, its place among the processes, and what goes wrong.

    `die_at`: SIGKILL to itself right before its n-th sync or rename of a file, counted from 1. `file_limit`: no file may grow
    beyond so many bytes. `count`: where it writes how often it synced and renamed.
    """

    script: Path
    architecture: str
    settings: dict[str, Any]
    log: Path
    environment: dict[str, str] = field(default_factory=dict)
    die_at: int = 0
    file_limit: int = 0
    count: Path | None = None


def run(order: Order) -> None:
    """The process's body: it ends with the script's own exit status, or where it is killed."""
    os.environ.update(order.environment, ACCELERATE_USE_CPU="true", HF_HUB_OFFLINE="1")
    become_a_program(order.log, order.log)
    writes = _watch_writes(order.die_at)
    if order.file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order.file_limit, order.file_limit))
    try:
        run_main(load(order.script).main, configure(order.architecture, order.settings))
    finally:
        if order.count is not None:
            order.count.write_text(str(len(writes)))


def load(script: Path) -> Any:
    """A training script as a module."""
    spec = importlib.util.spec_from_file_location(script.stem, script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def configure(architecture: str, settings: dict[str, Any]) -> Any:
    """The config of settings by dotted key."""
    nested: dict[str, Any] = {}
    for key, value in settings.items():
        section, _, name = key.partition(".")
        nested.setdefault(section, {})[name] = value
    return models.ARCHITECTURES[architecture].config_class()(**nested)


def _watch_writes(die_at: int) -> list[str]:
    """Counts what makes a file last (fsync, replace, rename), and ends the process right before one of them."""
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
