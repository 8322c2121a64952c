"""The part of a plan on what the training costs: FLOPs, peak memory and time of a micro-batch of each bucket."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sushi_research.caches.inputs import Inputs
from sushi_research.config.text_encoders import is_in_step
from sushi_research.errors import first_line
from sushi_research.evaluation.validation_set import CHUNK
from sushi_research.fast.decision import decide
from sushi_research.planning.memory import GIB, Memory
from sushi_research.runs import machine, rates
from sushi_research.runs.job import Job
from sushi_research.sampling.prompts import SamplePrompt
from sushi_research.sampling.vae_tiles import TILES
from sushi_research.training.step_costs import NotTraced, StepCosts

# Buckets that are printed one by one; plan.json has all.
_SHOWN_BUCKETS = 6
_INDENT = " " * 13


@dataclass(frozen=True)
class BucketCost:
    """A micro-batch of a bucket, such as "1024x1024" (width x height), with so many samples; an epoch has `images` of the bucket.

    `seconds` are estimated from what this machine has measured; None if it has not.
    """

    bucket: str
    images: int
    samples: int
    flops: float
    memory: Memory
    seconds: float | None


@dataclass(frozen=True)
class CostPlan:
    """What a run costs. `step_flops` are those of a step on one process, on average over the data.

    `around` has the peaks next to those of training, by stage: caching one image, evaluating, sampling whole and in tiles.
    `problem` says why nothing is known; then there are no buckets.
    """

    on_gpu: bool
    processes: int = 1
    buckets: tuple[BucketCost, ...] = ()
    step_flops: float = 0.0
    held: float = 0.0
    around: Mapping[str, Memory] | None = None
    device_bytes: float = 0.0
    problem: str | None = None

    @property
    def largest(self) -> BucketCost:
        """The bucket whose micro-batch has the highest peak."""
        return max(self.buckets, key=lambda each: each.memory.with_context)

    def step_seconds(self, accumulation: int) -> float | None:
        """The estimated seconds of a step on average; None if one of the buckets is not known."""
        known = [each.seconds * each.images for each in self.buckets if each.seconds is not None]
        if not self.buckets or len(known) < len(self.buckets):
            return None
        return accumulation * sum(known) / sum(each.images for each in self.buckets)

    def to_json(self) -> dict[str, Any]:
        """For plan.json: bytes, FLOPs and seconds."""
        if self.problem:
            return {"problem": self.problem}
        return {
            "step_flops": self.step_flops,
            "held_bytes": self.held,
            "buckets": {
                each.bucket: {
                    "samples": each.samples,
                    "flops": each.flops,
                    "seconds": each.seconds,
                    **_memory_json(each.memory),
                }
                for each in self.buckets
            },
            "around": {stage: _memory_json(peak) for stage, peak in (self.around or {}).items()},
        }

    def describe(self) -> list[str]:
        """The lines of the plan."""
        if self.problem:
            return [f"memory       not predicted: {self.problem}"]
        largest, count = self.largest, len(self.buckets)
        each = f" on each of {self.processes} processes" if self.processes > 1 else ""
        where = f" in a micro-batch of {largest.samples} x {largest.bucket}" if count > 1 else ""
        lines = [
            f"compute      {_tera(self.step_flops)} TFLOP per step{each}",
            f"memory       at most {_show(largest.memory, self.on_gpu)}{where} (predicted)",
        ]
        if 1 < count <= _SHOWN_BUCKETS:
            lines += [f"{_INDENT}{line}" for line in self._table()]
        around = self.around or {}
        for stage, peak in around.items():
            if stage != "sampling in tiles" and peak.with_context > largest.memory.with_context:
                lines.append(f"{_INDENT}{stage} takes more: {_show(peak, self.on_gpu)}{self._in_tiles(stage)}")
        if self.device_bytes and largest.memory.with_context > self.device_bytes:
            lines.append(
                f"{_INDENT}that is more than the {self.device_bytes / GIB:.1f} GiB of the device: --train.memory "
                f"{int(self.device_bytes / GIB)}GiB chooses what fits"
            )
        return lines

    def _in_tiles(self, stage: str) -> str:
        tiles = (self.around or {}).get("sampling in tiles")
        if stage != "sampling" or tiles is None:
            return ""
        return f"; where that does not fit, the VAE decodes in tiles: {tiles.with_context / GIB:.1f} GiB"

    def _table(self) -> list[str]:
        rows = [("bucket", "samples", "TFLOP", "GiB", "seconds")]
        rows += [
            (
                each.bucket,
                str(each.samples),
                _tera(each.flops),
                f"{each.memory.with_context / GIB:.2f}",
                "unknown" if each.seconds is None else f"{each.seconds:.3g} (estimate)",
            )
            for each in self.buckets
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def cost_plan(
    job: Job, inputs: Inputs, costs: StepCosts, images: Sequence[SamplePrompt], *, base_bytes: int
) -> CostPlan:
    """What a run costs that draws these sample `images`. `base_bytes` are those of the UNet's weights in the compute dtype.

    A model that cannot be traced is a `problem` of the plan, and no error: training it shows what is wrong with it, if anything is.
    """
    config, on_gpu, items = job.config, job.device.type == "cuda", inputs.data.items
    recorded = decide(config, job.device).is_recorded
    checkpointing, batch = config.train.gradient_checkpointing, config.train.batch_size
    try:
        found = []
        counts = np.bincount(items.bucket_ids)
        flops_of_epoch = 0.0
        for size, count in zip(items.buckets, counts, strict=True):
            flops = costs.flops(checkpointing, batch, size)
            flops_of_epoch += count * flops / batch
            found.append(
                BucketCost(
                    bucket=f"{size[1]}x{size[0]}",
                    images=int(count),
                    samples=batch,
                    flops=flops,
                    memory=costs.peak(checkpointing, batch, size, recorded),
                    seconds=rates.seconds_of(
                        Path(config.cache.folder), conditions_of(job, recorded, base_bytes), flops
                    ),
                )
            )
        widest = max(items.buckets, key=lambda size: size[0] * size[1])
        around = {"caching": costs.caching(widest)}
        if inputs.data.measured:
            around["evaluating"] = costs.evaluating(checkpointing, CHUNK, widest)
        if config.sample.enabled and images:
            largest = max(((image.height, image.width) for image in images), key=lambda size: size[0] * size[1])
            around |= {
                "sampling": costs.sampling(largest, None),
                "sampling in tiles": costs.sampling(largest, TILES[0]),
            }
    except NotTraced:
        return CostPlan(on_gpu, problem="a dry run (--dry-run) predicts it, in some seconds")
    except Exception as error:  # whatever diffusers or torch raise for a model that they cannot run
        return CostPlan(on_gpu, problem=first_line(error))
    return CostPlan(
        on_gpu=on_gpu,
        processes=job.world,
        buckets=tuple(found),
        step_flops=flops_of_epoch / len(items) * batch * config.train.accumulation,
        held=costs.held.total,
        around=around,
        device_bytes=device_bytes(job),
    )


def device_bytes(job: Job) -> float:
    """The memory of the job's device."""
    facts = machine.hardware(str(job.device))
    return (facts["gpu_memory_gib"] or facts["memory_gib"]) * GIB


def may_trace(job: Job) -> bool:
    """Whether a plan may spend seconds on a prediction: that of a dry run, and on a GPU, whose memory may end the run."""
    return job.is_main and (job.dry_run is not None or job.device.type == "cuda")


def conditions_of(job: Job, recorded: bool, base_bytes: int) -> dict[str, Any]:
    """What decides how many FLOPs a second this machine computes in a step of the job, for runs/rates.py.

    `base_bytes` tells bases of one architecture apart: a tiny one computes far fewer FLOPs a second than a real one.
    """
    config, device = job.config, str(job.device)
    return {
        "device": machine.device_name(device),
        "threads": None if job.device.type == "cuda" else machine.hardware(device)["threads"],
        "architecture": job.model.NAME,
        "base_bytes": base_bytes,
        "precision": job.precision,
        "step": "recorded" if recorded else "eager",
        "checkpointing": config.train.gradient_checkpointing,
        "attention": config.train.attention,
        "base_storage": config.model.base_storage,
        "deterministic": config.train.deterministic,
        **({"text_encoders": True} if is_in_step(config.text_encoders) else {}),
    }


def _memory_json(memory: Memory) -> dict[str, int]:
    return {
        "allocated": round(memory.allocated),
        "reserved": round(memory.reserved),
        "with_context": round(memory.with_context),
    }


def _show(memory: Memory, on_gpu: bool) -> str:
    if on_gpu:
        return memory.describe()
    return f"{memory.allocated / GIB:.2f} GiB in tensors, {memory.with_context / GIB:.2f} with the rest of the process"


def _tera(flops: float) -> str:
    return f"{flops / 1e12:.3g}"
