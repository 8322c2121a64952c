"""train.memory: the batch size, accumulation and gradient checkpointing with which a training fits into that much memory.

A step has the same samples whatever is chosen, so what is learned is the same. Of the choices that fit by the prediction of
planning/, the one with the least work is taken. A run keeps its choice: it is in its config.yaml.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list

from sushi_research.adapters.settings import settings_of
from sushi_research.caches.caches import open_remembered
from sushi_research.config import TrainingConfig
from sushi_research.config.learning import MOST_PARTS
from sushi_research.config.section import memory_bytes
from sushi_research.config.yaml12 import read_yaml
from sushi_research.data.training_data import Data
from sushi_research.errors import UserError, first_line
from sushi_research.evaluation.validation_set import CHUNK
from sushi_research.fast.checkpointing import MODES
from sushi_research.fast.decision import decide
from sushi_research.models import loading
from sushi_research.planning.memory import CONTEXT, GIB, RECORDED_CONTEXT
from sushi_research.runs.job import Job, agree
from sushi_research.runs.run_folder import RunFolder
from sushi_research.sampling.vae_tiles import TILES
from sushi_research.training import text_encoder_plan
from sushi_research.training.caption_plan import encoder_bytes
from sushi_research.training.cost_plan import device_bytes
from sushi_research.training.step_costs import StepCosts
from sushi_research.training.trainable import adapter_shapes

# The part of the memory that is kept free, because a prediction is not exact: within 3 % of the H200's rows.
RESERVE = 0.04
# What a micro-batch takes besides its samples, in samples without checkpointing: launches, and kernels that are too small for the
# GPU. On an H200 a recorded SDXL step takes 33 ms and 44 ms per sample, that is 0.75; on a smaller GPU a sample takes longer. A CPU
# has no such part.
OVERHEAD = 0.5


@dataclass(frozen=True)
class Choice:
    """How the samples of a step are computed, and the predicted peak in bytes; a choice that was made earlier has none."""

    batch_size: int
    accumulation: int
    checkpointing: str
    peak: float | None = None

    def describe(self) -> str:
        return (
            f"batch {self.batch_size} x accumulation {self.accumulation}, gradient_checkpointing {self.checkpointing}"
        )


def fit_memory(job: Job, base: loading.Base, data: Data) -> Job:
    """The job with the choice for its train.memory in its config; the same job without that key. A line says why.

    On a GPU a run is also held to that memory: what adapts to the device, such as the number of images that are encoded at once and
    the tiles in which samples are decoded, then adapts to it. Raises UserError if nothing fits.
    """
    train = job.config.train
    if train.memory is None:
        return job
    found: list[Any] = [None]
    error = None
    if job.is_main:
        try:
            found = [_kept(job) or _choose(job, base, data)]
        except UserError as raised:
            error = raised
    agree(error)
    choice, lines = broadcast_object_list(found)[0]
    job.say(*lines)
    if job.device.type == "cuda" and job.dry_run is None:
        _hold_to(memory_bytes(train.memory), job)
    changed = {
        "batch_size": choice.batch_size,
        "accumulation": choice.accumulation,
        "gradient_checkpointing": choice.checkpointing,
    }
    return replace(job, config=job.config.model_copy(update={"train": train.model_copy(update=changed)}))


def _kept(job: Job) -> tuple[Choice, list[str]] | None:
    """The choice in the config.yaml of the job's run, if it has begun with the same train.memory and the same samples per step."""
    train, folder = job.config.train, RunFolder(job.run_path, None)
    try:
        if folder.record() is None:
            return None
        before = read_yaml(str(folder.config))["train"]
        choice = Choice(int(before["batch_size"]), int(before["accumulation"]), str(before["gradient_checkpointing"]))
        same = before.get("memory") is not None and memory_bytes(before["memory"]) == memory_bytes(train.memory)
    except (UserError, OSError, KeyError, TypeError, ValueError):
        return None  # a damaged file is reported where the run resumes
    if (
        not same
        or choice.checkpointing not in MODES
        or train.gradient_checkpointing not in ("none", choice.checkpointing)
        or choice.batch_size * choice.accumulation != train.batch_size * train.accumulation
    ):
        return None
    return choice, [f"memory       train.memory {train.memory}: {choice.describe()}, as the run has begun with it"]


def _choose(job: Job, base: loading.Base, data: Data) -> tuple[Choice, list[str]]:
    """The choice with the least predicted work that fits, and the lines that say why."""
    config = job.config
    limit = min(memory_bytes(config.train.memory), device_bytes(job))
    found = _candidates(job, _costs(job, base, data), data, (1 - RESERVE) * limit)
    name = f"train.memory {config.train.memory}"
    fitting = [each for each in found if each[1].peak <= (1 - RESERVE) * limit]
    if not fitting:
        smallest = min((each for _, each in found), key=lambda each: (each.peak, each.batch_size))
        raise UserError(_nothing_fits(job, base, data, smallest))
    # FLOPs that are equal but for rounding are equal.
    _, choice = min(
        fitting, key=lambda each: (float(f"{each[0]:.6g}"), -each[1].batch_size, MODES.index(each[1].checkpointing))
    )
    of_device = " of which the device has" if limit < memory_bytes(config.train.memory) else ""
    lines = [
        f"memory       {name}{of_device} ({limit / GIB:.2f} GiB): {choice.describe()} takes {choice.peak / GIB:.2f} GiB at the "
        f"peak, and {RESERVE * limit / GIB:.2f} are kept free"
    ]
    without = [each for _, each in found if each.checkpointing == "none" and each.peak > (1 - RESERVE) * limit]
    if choice.checkpointing != "none" and without:
        smallest = min(without, key=lambda each: each.peak)
        lines.append(
            f"             without checkpointing, a micro-batch of {smallest.batch_size} takes {smallest.peak / GIB:.2f} GiB"
        )
    return choice, lines


def _candidates(job: Job, costs: StepCosts, data: Data, limit: float) -> list[tuple[float, Choice]]:
    """(the work, the choice) of each way to compute the samples of a step.

    If all samples fit at once without checkpointing, no other way can be better, and only those without are returned.
    """
    config = job.config
    samples, given = config.train.batch_size * config.train.accumulation, config.train.gradient_checkpointing
    buckets = data.items.buckets
    counts = np.bincount(data.items.bucket_ids)
    around = _around(job, costs, data)
    batches = [
        size for size in range(min(samples, MOST_PARTS), 0, -1) if samples % size == 0 and samples // size <= MOST_PARTS
    ]
    found: list[tuple[float, Choice]] = []
    try:
        one = costs.flops(given, 1, max(buckets, key=lambda size: size[0] * size[1]))
        overhead = OVERHEAD * one if job.device.type == "cuda" else 0.0
        for mode in MODES if given == "none" else (given,):
            for batch in batches:
                recorded = decide(_with_mode(config, mode), job.device).is_recorded
                peaks = [costs.peak(mode, batch, size, recorded).with_context for size in buckets]
                flops = float(np.average([costs.flops(mode, batch, size) for size in buckets], weights=counts))
                work = samples // batch * (overhead + flops)
                found.append((work, Choice(batch, samples // batch, mode, max(*peaks, around))))
            if mode == "none" and found[0][1].peak <= limit:
                break
    except Exception as error:  # whatever diffusers or torch raise for a model that they cannot run
        raise UserError(
            f"train.memory cannot be used with this base, whose memory cannot be predicted ({first_line(error)}): remove it, and "
            "set train.batch_size and train.gradient_checkpointing."
        ) from error
    return found


def _around(job: Job, costs: StepCosts, data: Data) -> float:
    """The bytes that the run takes besides training, where it takes as little as it can."""
    config, widest = job.config, max(data.items.buckets, key=lambda size: size[0] * size[1])
    needed = [costs.caching(widest).with_context]
    if data.measured:
        needed.append(costs.evaluating(config.train.gradient_checkpointing, CHUNK, widest).with_context)
    if config.sample.enabled and job.device.type == "cuda":
        needed.append(costs.sampling(widest, TILES[-1]).with_context)
    return max(needed)


def _nothing_fits(job: Job, base: loading.Base, data: Data, smallest: Choice) -> str:
    """The sentence for a memory into which no choice fits."""
    config = job.config
    assert smallest.peak is not None and config.train.memory is not None
    limit = min(memory_bytes(config.train.memory), device_bytes(job))
    remedies = [f"give at least {smallest.peak / (1 - RESERVE) / 1e9 + 0.05:.1f}GB"]
    for kind in ("int8", "nf4") if config.model.base_storage == "compute" else ():
        other = replace(
            job, config=config.model_copy(update={"model": config.model.model_copy(update={"base_storage": kind})})
        )
        least = min(choice.peak for _, choice in _candidates(other, _costs(other, base, data), data, 0.0))
        if least <= (1 - RESERVE) * limit:
            remedies.append(
                f"hold the base in fewer bits, with which it takes {least / GIB:.2f} GiB (--model.base_storage {kind}, which "
                "changes what is learned: docs/small_base.md)"
            )
            break
    remedies.append("lower the resolution or lora.rank")
    what = f"the smallest micro-batch ({smallest.batch_size} with gradient_checkpointing {smallest.checkpointing})"
    if smallest.peak == _around(job, _costs(job, base, data), data):
        what = "what the run does besides training (encoding, evaluating, sampling)"
    return (
        f"train.memory is {config.train.memory}, and {what} takes {smallest.peak / GIB:.2f} GiB, with {RESERVE:.0%} kept free: "
        f"{'; or '.join(remedies)}."
    )


def _costs(job: Job, base: loading.Base, data: Data) -> StepCosts:
    settings = settings_of(job.config.lora, seed=0)
    shapes = adapter_shapes(loading.empty_unet(base), settings, job.start and job.start.matches["unet"])
    shapes |= text_encoder_plan.shapes_of(job, base)
    encoders = encoder_bytes(job, base) if data.captions is not None and data.captions.in_step else 0
    return StepCosts(job, base, shapes, open_remembered(job.config), encoders)


def _with_mode(config: TrainingConfig, mode: str) -> TrainingConfig:
    return config.model_copy(update={"train": config.train.model_copy(update={"gradient_checkpointing": mode})})


def _hold_to(limit: float, job: Job) -> None:
    """Makes torch's allocator refuse more than `limit` bytes less those of the CUDA context."""
    total = torch.cuda.get_device_properties(job.device).total_memory
    context = RECORDED_CONTEXT if decide(job.config, job.device).is_recorded else CONTEXT
    # Of the current GPU, which is the job's: the function refuses a device without an index, which the only process has.
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(limit - context, 0.0) / total))
