"""The start of a training, part by part: what `benchmarking.data` measures, in a process of its own.

The training script's own `train` runs from the search of the base until its Loader is made. In its namespace, each function that
it calls is replaced by itself with a clock, so what is measured is what a user runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from benchmarking.measured_code import load_script
from sushi_research import models
from sushi_research.caches.inputs import Inputs
from sushi_research.caches.keys import hex_digits
from sushi_research.runs.job import Job
from sushi_research.training import run
from sushi_research.training.loader import Loader

# The parts in their order, as (name, where its function is found in the script).
PARTS = (
    ("base", "find_base"),
    ("data", "read_data"),
    ("caches", "open_caches"),
    ("plan", "make_plan"),
    ("resume", "resume.start_or_resume"),
    ("fill", "fill_caches"),
)
# A cache entry has these instead of real tensors: latents of [4, 2, 2] and embeddings of 4 values.
ROWS_PER_SHARD = 1000


class Reached(Exception):
    """The point of the script at which the measurement of its start ends."""


class Meter:
    """Measures parts: seconds, CPU seconds (with child processes), and memory. Writes each part to a file when it ends."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.baseline = _memory()["VmRSS"]

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[dict[str, Any]]:
        """Measures the block. The peak is that of the block, in MiB above the memory at the beginning of the measurement."""
        further: dict[str, Any] = {}
        _reset_peak()
        start, cpu = time.perf_counter(), _cpu_seconds()
        try:
            yield further
        finally:
            seconds, cpu_seconds, memory = time.perf_counter() - start, _cpu_seconds() - cpu, _memory()
            found = {
                "part": name,
                "seconds": round(seconds, 3),
                "cpu_seconds": round(cpu_seconds, 3),
                "peak_mib": round((memory["VmHWM"] - self.baseline) / 1024, 1),
                "after_mib": round((memory["VmRSS"] - self.baseline) / 1024, 1),
                "of_files_mib": round(memory["RssFile"] / 1024, 1),
                **further,
            }
            if self.path:
                with self.path.open("a") as file:
                    file.write(json.dumps(found) + "\n")

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, measured as a part whenever it is called."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return call


def start(script: ModuleType, config: Any, meter: Meter, fill: bool) -> tuple[Loader, contextlib.ExitStack]:
    """Runs the script until its Loader is made and gives it, with what must be closed.

    `fill`: the caches get tiny entries from `fill_tiny`; otherwise the script's own `fill_caches` must find nothing to encode.
    """
    model = models.load(config_architecture(config))
    found: dict[str, Any] = {}

    def loader(*args: Any, **kwargs: Any) -> Loader:
        found["loader"] = Loader(*args, **kwargs)
        return found["loader"]

    def reached(*_: Any) -> None:
        raise Reached

    with contextlib.ExitStack() as undo:
        for name, place in PARTS:
            owner, _, attribute = place.rpartition(".")
            namespace = getattr(script, owner) if owner else script
            function = fill_tiny if name == "fill" and fill else getattr(namespace, attribute)
            _replace(undo, namespace, attribute, meter.timed(name, function))
        _replace(undo, script, "Loader", loader)
        _replace(undo, script.run, "open_trackers", reached)
        finish = contextlib.ExitStack()
        job = finish.enter_context(run.open_run(run.start_job(config, model, script.__file__)))
        with contextlib.suppress(Reached):
            script.train(job)
    finish.callback(found["loader"].close)
    return found["loader"], finish


def _replace(undo: contextlib.ExitStack, namespace: Any, name: str, value: Any) -> None:
    undo.callback(setattr, namespace, name, getattr(namespace, name))
    setattr(namespace, name, value)


def config_architecture(config: Any) -> str:
    return next(name for name, each in models.config_classes().items() if isinstance(config, each))


def fill_tiny(job: Job, inputs: Inputs) -> tuple[int, int]:
    """Writes an entry of a tiny payload for each missing one, with the stores' own writers."""
    caches = inputs.caches
    half = torch.full((4, 2, 2), 0.5, dtype=torch.float16)
    latents = hex_digits(inputs.missing_latents().keys)
    texts = hex_digits(caches.missing_captions(inputs.captions).keys)
    text = {name: half[:, 0, 0] for name in job.model.TEXT_TENSORS}
    for store, keys, tensors in ((caches.latents, latents, {"mean": half, "std": half}), (caches.texts, texts, text)):
        with store.writer(max_rows=ROWS_PER_SHARD) as writer:
            for key in keys:
                writer.add(key, tensors, {})
        store.refresh()
    return len(latents), len(texts)


def measure_loader(loader: Loader, meter: Meter, seconds: float) -> None:
    """Measures the order of the first epoch and how fast the loader gives samples, for about so many seconds."""
    with meter.part("order"):
        loader.sampler.step(0)
    with meter.part("samples") as further:
        count, step, until = 0, 0, time.perf_counter() + seconds
        begun = time.perf_counter()
        while time.perf_counter() < until:
            count += sum(len(batch) for batch in loader.step(step))
            step += 1
        further["samples"] = count
        further["samples_per_second"] = round(count / (time.perf_counter() - begun), 1)


def _memory() -> dict[str, int]:
    """Memory of this process in KiB (Linux): VmRSS now, VmHWM its peak, RssFile the part that is mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    values = dict(line.split(":", 1) for line in lines)
    return {name: int(values[name].split()[0]) for name in ("VmRSS", "VmHWM", "RssFile")}


def _reset_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _cpu_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def config_of(data: Path, work: Path, held_out: float, base: Path) -> Any:
    """The config of a measurement: 64x64 pixels, four samples a step, one epoch."""
    return models.ARCHITECTURES["sdxl"].config_class()(
        model={"base": str(base)},
        data={"path": str(data), "resolution": 64, "bucket_step": 8},
        cache={"folder": str(work / "cache")},
        lora={"targets": ["attn2.to_k"], "rank": 4},
        train={"epochs": 1, "batch_size": 4, "precision": "fp32"},
        optimizer={"name": "adamw"},
        evaluation={"held_out": held_out},
        sample={"enabled": False},
        tracking={"wandb": "off"},
        run={"folder": str(work / "runs"), "name": "measured"},
    )


def main(spec: dict[str, Any]) -> None:
    """Measures one start, as `spec` (JSON of the command line) says."""
    run.quiet_libraries()
    script, work = load_script("sdxl"), Path(spec["work"])
    # First eight images, so that no import and no constant cost is in the measurement.
    small = config_of(Path(spec["small"]), Path(spec["small"]).parent / "small", 0.25, Path(spec["base"]))
    loader, finish = start(script, small, Meter(None), fill=True)
    with finish:
        list(loader.step(0))
    meter = Meter(Path(spec["parts"]))
    config = config_of(Path(spec["data"]), work, spec["held_out"], Path(spec["base"]))
    loader, finish = start(script, config, meter, fill=spec["fill"])
    with finish:
        measure_loader(loader, meter, spec["seconds"])


if __name__ == "__main__":
    import sys

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(json.loads(sys.argv[1]))
