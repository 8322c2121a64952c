"""What the rows of `benchmarking.gpu` measure: a UNet of the real size with its adapter, and whole steps of the training script."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import torch
from accelerate import Accelerator

from benchmarking.measured_code import load_script
from sushi_research import models, objectives
from sushi_research.adapters import lora
from sushi_research.adapters.settings import AdapterSettings
from sushi_research.fast import checkpointing
from sushi_research.fast.batch import Batch
from sushi_research.fast.decision import MOST_SHAPES
from sushi_research.fast.recording import Recorder, StepBuffers
from sushi_research.models.diffusers_folder import FolderPart
from sushi_research.models.prediction import Prediction
from sushi_research.runs.job import Job
from sushi_research.training import optim
from sushi_research.training.master_weights import MasterWeights
from sushi_research.training.recorded_step import make_graphs
from sushi_research.training.state import TrainState
from sushi_research.training.step_metrics import StepMetrics

GIB = 2**30
# TFLOP of a step per image at the real resolution, rank 16 on the attention layers (docs/performance.md).
TFLOP = {"sdxl": 14.58, "sd15": 1.788}
RANK, RATE, SEED = 16, 1e-4, 0


@dataclass(frozen=True)
class Sizes:
    """What differs between a GPU and the rehearsal on a CPU: pixels by architecture, precision, the side of the matrix product."""

    pixels: dict[str, int]
    precision: str
    matrix: int


REAL = Sizes({"sdxl": 1024, "sd15": 512}, "bf16", 8192)
SMALL = Sizes({"sdxl": 64, "sd15": 64}, "fp32", 64)


@dataclass(frozen=True)
class Step:
    """How the steps of a row are taken."""

    batch_size: int = 1
    recorded: bool = True
    checkpointing: str = "none"
    optimizer: str = "adamw"


class Subject:
    """A frozen UNet with an adapter, and its training as the script does it, on batches of random latents and text."""

    def __init__(
        self, architecture: str, base: Path, step: Step, sizes: Sizes, storage: str = "compute", graphs: Any = None
    ) -> None:
        self.architecture, self.sizes, self.how = architecture, sizes, step
        self.model: ModuleType = models.load(architecture)
        self.script = load_script(architecture)
        accelerator = Accelerator(mixed_precision="no", cpu=not torch.cuda.is_available())
        config = models.ARCHITECTURES[architecture].config_class()(
            model={"base": str(base), "base_storage": storage},
            data={"path": "none", "resolution": sizes.pixels[architecture]},
            optimizer={"name": step.optimizer},
            train={"steps": 1, "batch_size": step.batch_size, "gradient_checkpointing": step.checkpointing},
        )
        self.job = Job(config, self.model, accelerator, sizes.precision)
        part = FolderPart("unet", base / "unet", None)
        self.unet = part.load(self.job.compute_dtype, self.job.device, storage).requires_grad_(False)
        lora.attach(
            self.unet,
            AdapterSettings(targets="attention", rank=RANK, alpha=float(RANK), dropout=0.0, init="default", seed=SEED),
        )
        self.unet.train()
        checkpointing.enable(self.unet, step.checkpointing, draws=False)
        self.master_weights = MasterWeights(lora.adapter_parameters({"unet": self.unet}), self.job.compute_dtype)
        optimizer = optim.build_optimizer(step.optimizer, self.master_weights, RATE, {})
        self.state = TrainState(self.master_weights, optimizer, self.job.scaler)
        self.metrics = StepMetrics(self.job)
        self.objective = objectives.make_objective(config, Prediction(), self.job.device)
        self.said: list[str] = []
        self.recorder = self._recorder(graphs)

    def _recorder(self, graphs: Any) -> Recorder:
        losses, sums = self.metrics.buffers()
        buffers = StepBuffers(
            gradients=[flat.grad for flat in self.master_weights.flat_parameters()],
            losses=losses,
            others=[sums],
            discard=self.master_weights.discard,
            require_in_place=self.master_weights.require_in_place,
        )
        made = graphs(buffers) if graphs else make_graphs(self.job.device, buffers)
        most = MOST_SHAPES if self.how.recorded and made is not None else 0
        self._records = most > 0
        return Recorder(self.micro_batch, buffers, made, say=self.said.append, most=most)

    @property
    def path(self) -> str:
        """How the steps so far were taken; the recorder says so if it could not record a shape."""
        return "recorded" if self._records and not self.said else "eager"

    def micro_batch(self, batch: Batch) -> None:
        """What the script's own `micro_batch` does."""
        self.script.training_step(self.job, self.unet, batch, self.objective, self.metrics)
        self.master_weights.accumulate()

    def step(self, batch: Batch) -> None:
        """One whole step, as in the script's loop, without its log, files and evaluation. It waits for the device once."""
        self.metrics.start()
        self.recorder(batch)
        self.metrics.record(batch.names, batch.roles)
        self.metrics.sum_over_processes(self.master_weights, stop=0, waited=0.0)
        self.job.scaler.unscale_(self.state.optimizer)
        torch.nn.utils.clip_grad_norm_(self.master_weights.flat_parameters(), 1.0)
        self.state.step_optimizer(1, 2)
        self.master_weights.refresh()
        self.master_weights.zero_grad()

    def batch(self, number: int) -> Batch:
        """A batch of random latents and text, on the device; `number` determines it."""
        size, device = self.how.batch_size, self.job.device
        side = self.sizes.pixels[self.architecture] // 8
        generator = torch.Generator(device).manual_seed(number)
        config = self.unet.config

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(size, *shape, generator=generator, device=device)

        text = {"hidden": normal(77, config.cross_attention_dim).half()}
        if "pooled" in self.model.TEXT_TENSORS:
            # What is left of the projection's input beside the six sizes.
            width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            text["pooled"] = normal(width).half()
        pixels = float(8 * side)
        return Batch(
            mean=normal(4, side, side).half(),
            std=normal(4, side, side).abs().half() * 0.1,
            text=text,
            time_ids=torch.tensor([[pixels, pixels, 0.0, 0.0, pixels, pixels]], device=device).repeat(size, 1),
            loss_weights=torch.ones(size, device=device),
            names=tuple(f"random {index}" for index in range(size)),
            keys=tuple((number, f"random {index}", 0) for index in range(size)),
            seed=SEED,
            device=device,
            prefetched={"noise": normal(4, side, side), "posterior": normal(4, side, side)},
            step=torch.tensor(number, device=device),
        )

    def close(self) -> None:
        """Frees the device."""
        self.recorder.stop()
        del self.unet, self.master_weights, self.state, self.recorder, self.metrics
        free()


def free() -> None:
    """Gives memory back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def run_steps(subject: Subject, seconds: float) -> dict[str, Any]:
    """Takes steps for so many seconds. Returns their times, whether they were recorded, and peak memory.

    `first` are those of the first 20 seconds after two steps of warm-up; `settled` those of the last third, if the row took a
    minute or more.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    batches = [subject.batch(number) for number in range(4)]
    begun, count, ends = time.perf_counter(), 0, []
    for _ in range(2):
        subject.step(batches[0])
    warm_up, started = time.perf_counter() - begun, time.perf_counter()
    while len(ends) < 3 or ends[-1] < seconds:
        subject.step(batches[count % len(batches)])
        count += 1
        ends.append(time.perf_counter() - started)
    durations = [after - before for before, after in zip([0.0, *ends], ends, strict=False)]
    found: dict[str, Any] = {
        "path": subject.path,
        "said": subject.said,
        "steps": count,
        "warm_up_seconds": warm_up,
        **_rates(subject, "first", [each for each, end in zip(durations, ends, strict=True) if end <= 20] or durations),
    }
    if seconds >= 60:
        settled = [each for each, end in zip(durations, ends, strict=True) if end > seconds * 2 / 3]
        found |= _rates(subject, "settled", settled)
    found["loss_is_finite"] = math.isfinite(float(subject.metrics.buffers()[0].sum()))
    return found | memory()


def _rates(subject: Subject, name: str, durations: list[float]) -> dict[str, float]:
    step, size = median(durations), subject.how.batch_size
    rate = size * len(durations) / sum(durations)
    found = {f"{name}_ms": step * 1e3, f"{name}_images_per_second": rate}
    if subject.sizes != REAL:
        return found  # the FLOPs are those of the real size
    return found | {f"{name}_tflops": rate * TFLOP[subject.architecture]}


def memory() -> dict[str, float]:
    """GiB: the peaks of allocated and reserved memory, and what is in use on the card now, with the CUDA context."""
    if not torch.cuda.is_available():
        return {}
    free_bytes, total = torch.cuda.mem_get_info()
    return {
        "allocated_gib": torch.cuda.max_memory_allocated() / GIB,
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB,
        "on_the_card_gib": (total - free_bytes) / GIB,
    }


def gradients(subject: Subject, batches: list[Batch], run: Callable[[Batch], None]) -> list[torch.Tensor]:
    """The gradient sum after each batch, from the same start."""
    found = []
    for batch in batches:
        subject.master_weights.zero_grad()
        run(batch)
        found.append(torch.cat([flat.grad.flatten() for flat in subject.master_weights.flat_parameters()]).clone())
    subject.master_weights.zero_grad()
    return found
