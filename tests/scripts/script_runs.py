"""Runs training scripts in tests: loads the scripts, makes small configs, and reads what a run wrote."""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file

from sushi_research import models
from sushi_research.config import TrainingConfig
from sushi_research.runs.checkpoint import Checkpoint, latest_checkpoint

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "scripts").glob("train_*_lora.py"))
CONFIGS: dict[str, type[TrainingConfig]] = models.config_classes()

# Metrics that depend on the clock or the machine.
TIMINGS = {"images_per_second", "gpu_seconds", "cpu_seconds", "data_wait_share", "peak_memory_gib"}

# The default targets of a run. They are few, because creating modules takes most of a small run's time. Their gradients depend
# on both the image and the caption.
TARGETS = ["attn2.to_k"]
# The default learning rate of a run, which is about how far a step of Adam moves a weight.
RATE = 1e-3
# The allowed difference of a weight, in units of RATE, after about ten steps of AdamW in fp32 with gradients summed in another
# order. The sums differ in the seventh digit, but Adam divides a gradient by its own size: for a gradient near zero, even the
# first digits differ.
# Observed: 0.0015 (SD1.5) and 0.009 (SDXL). A lost sample or other noise changes the sign of some steps: 1 and more.
TOLERANCE = 0.05


@functools.cache
def script(name: str) -> ModuleType:
    """A script as a module. It is executed on first access to one of its names, not while tests are collected.

    `scripts/` is not a package; only tests and the benchmark load scripts as modules.
    """
    spec = importlib.util.spec_from_file_location(name, ROOT / f"scripts/{name}.py")
    spec.loader = importlib.util.LazyLoader(spec.loader)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_script(architecture: str) -> ModuleType:
    """The training script of an architecture as a module."""
    return script(f"train_{architecture}_lora")


class Trainer:
    """Runs one architecture's script in this process: many short runs with one tiny base, one data set and one cache."""

    def __init__(self, architecture: str, base: Path, photos: Path, runs: Path, cache: Path) -> None:
        self.architecture, self.script = architecture, load_script(architecture)
        self.runs = runs
        self._settings = {
            "model.base": str(base),
            "data.path": str(photos),
            "data.resolution": 64,
            "data.bucket_step": 32,
            "cache.folder": str(cache),
            "run.folder": str(runs),
            "lora.targets": TARGETS,
            "lora.rank": 4,
            "lora.alpha": 2.0,
            "train.steps": 3,
            "train.batch_size": 4,
            "train.precision": "fp32",
            "optimizer.name": "adamw",
            "optimizer.lr": RATE,
            "checkpoint.every": 1,
            # Writing and verifying one takes as long as ten steps; tests/scripts/test_step_files.py has them.
            "checkpoint.keep_adapters": 0,
            "sample.enabled": False,
            "tracking.wandb": "off",
        }

    def config(self, name: str, changes: dict[str, Any] | None = None) -> TrainingConfig:
        """The config of the run `name`: the small settings above, with `changes` by dotted key."""
        nested: dict[str, Any] = {}
        for key, value in {**self._settings, "run.name": name, **(changes or {})}.items():
            section, _, field = key.partition(".")
            nested.setdefault(section, {})[field] = value
        return CONFIGS[self.architecture](**nested)

    def train(self, name: str, changes: dict[str, Any] | None = None) -> int:
        """Runs the script's `main`; returns its exit status."""
        return self.script.main(self.config(name, changes))

    def folder(self, name: str) -> Path:
        """The run folder."""
        return self.runs / name

    def adapter(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of the run's adapter file."""
        return load_file(self.folder(name) / f"{name}.safetensors")

    def plan(self, name: str) -> dict[str, Any]:
        """The content of plan.json."""
        return json.loads((self.folder(name) / "plan.json").read_text())

    def metrics(self, name: str) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl without the metrics that depend on the clock and the machine."""
        lines = (self.folder(name) / "metrics.jsonl").read_text().splitlines()
        return [{key: value for key, value in json.loads(line).items() if key not in TIMINGS} for line in lines]

    def checkpoint(self, name: str) -> Checkpoint:
        """The newest complete checkpoint of the run; asserts that there is one."""
        checkpoint = latest_checkpoint(self.folder(name) / "checkpoints")
        assert checkpoint is not None
        return checkpoint

    def master_weights(self, name: str) -> dict[str, torch.Tensor]:
        """The fp32 adapter of the run's last checkpoint."""
        return self.checkpoint(name).load()["adapter"]


class RecordingSGD(torch.optim.SGD):
    """Plain SGD that records its gradients as `gradients[step][i]`; use `optimizer.name: script_runs.RecordingSGD`."""

    gradients: list[list[torch.Tensor]] = []

    def step(self, closure: Any = None) -> Any:
        self.gradients.append([master.grad.clone() for group in self.param_groups for master in group["params"]])
        return super().step(closure)


def assert_equal(found: Any, expected: Any, where: str = "") -> None:
    """Asserts that two nests of dicts, lists, tensors and plain values are equal bit for bit."""
    assert type(found) is type(expected), where
    if isinstance(expected, dict):
        assert list(found) == list(expected), where
        for key in expected:
            assert_equal(found[key], expected[key], f"{where}[{key!r}]")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for index, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_equal(one, other, f"{where}[{index}]")
    elif isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype and torch.equal(found, expected), where
    else:
        assert found == expected, f"{where}: {found!r} is not {expected!r}"


def tensors_in(nest: Any) -> Iterator[torch.Tensor]:
    """All tensors in a nest of dicts and lists."""
    if isinstance(nest, torch.Tensor):
        yield nest
    elif isinstance(nest, dict | list | tuple):
        for value in nest.values() if isinstance(nest, dict) else nest:
            yield from tensors_in(value)


def largest_difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest absolute difference between two sets of tensors of the same names."""
    assert found.keys() == expected.keys()
    return max((found[name] - expected[name]).abs().max().item() for name in expected)
