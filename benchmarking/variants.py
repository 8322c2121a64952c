"""The pairs of variants of a training step that benchmarks compare, built on the `training_step` of the training scripts.

To add a pair, write a function that builds each variant (it gets the bench and a UNet with its adapter, and returns the step), and
add the pair to PAIRS; benchmarking/__main__.py times all pairs in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch

from sushi_research import conditioning, objectives
from sushi_research.adapters.lora import adapter_parameters, attach
from sushi_research.adapters.settings import settings_of
from sushi_research.caches.caches import Caches
from sushi_research.config import TrainingConfig
from sushi_research.config.sets import sets_of
from sushi_research.data import images
from sushi_research.data.items import Item
from sushi_research.errors import UserError
from sushi_research.fast import checkpointing
from sushi_research.fast.batch import Batch
from sushi_research.fast.graphs import CudaGraphs
from sushi_research.fast.recording import Recorder, StepBuffers
from sushi_research.models import loading
from sushi_research.runs.job import Job
from sushi_research.training import optim
from sushi_research.training.loader import Loader
from sushi_research.training.master_weights import MasterWeights
from sushi_research.training.sampler import Sampler, StepSample
from testing.rerun import Rerun

# A step takes its index, which determines its samples, and returns its loss (a tensor on the device).
Step = Callable[[int], torch.Tensor]


@dataclass(frozen=True)
class Bench:
    """What the variants of one architecture share. `finish` closes resources that a variant opened."""

    job: Job
    script: ModuleType
    base: loading.Base
    items: list[Item]
    sampler: Sampler
    caches: Caches
    finish: ExitStack

    @property
    def config(self) -> TrainingConfig:
        return self.job.config

    @property
    def model(self) -> ModuleType:
        return self.job.model

    @property
    def device(self) -> torch.device:
        return self.job.device


class LossSum:
    """Replaces the script's StepMetrics: sums the loss on the device without synchronising.

    `losses` [B] are those of the last micro-batch's samples.
    """

    def __init__(self, device: torch.device, batch_size: int) -> None:
        self.loss = torch.zeros((), device=device)
        self.losses = torch.zeros(batch_size, device=device)

    def add(self, loss: torch.Tensor, losses: torch.Tensor, bins: torch.Tensor) -> None:
        """Like StepMetrics.add, but keeps only the losses."""
        self.loss += loss.detach()
        self.losses[: len(losses)].copy_(losses.detach())


def make_unet(bench: Bench) -> torch.nn.Module:
    """The frozen UNet in the compute dtype with an fp32 adapter, as the training script makes it."""
    unet = loading.load_unet(bench.base, bench.job.compute_dtype, bench.device)
    attach(unet, settings_of(bench.config.lora, bench.config.train.seed))
    return unet.train()


def make_objective(bench: Bench) -> objectives.Objective:
    """The training objective, made from the config and the base as in the training script."""
    config, prediction = bench.config, bench.base.prediction
    return objectives.make_objective(config, prediction, bench.device, dropout=config.lora.dropout)


def with_master_weights(
    bench: Bench,
    unet: torch.nn.Module,
    batches: Callable[[int], Any],
    *,
    single: bool = False,
    static: bool = False,
    recompute: str = "none",
) -> Step:
    """The step of the training script: fp32 master weights, a working copy in the compute dtype.

    `single`: the optimizer gets the single tensors, as those do that are not elementwise. `static`: from a recording of the
    micro-batch on a GPU; on a CPU the same code without one, on batches at fixed addresses. `recompute` is a mode of checkpointing.
    """
    # A job of its own: the loss scaler belongs to one variant.
    config, objective, job = bench.config, make_objective(bench), replace(bench.job)
    scaler = job.scaler
    master_weights = MasterWeights(adapter_parameters({"unet": unet}), bench.job.compute_dtype)
    checkpointing.enable(unet, recompute, draws=config.lora.dropout > 0)
    if single:
        optimizer = optim.make_optimizer(config.optimizer.name, master_weights.parameters(), config.optimizer.lr, {})
    else:
        optimizer = optim.build_optimizer(config.optimizer.name, master_weights, config.optimizer.lr, {})
    metrics = LossSum(bench.device, config.train.batch_size)

    def micro_batch(batch: Batch) -> None:
        bench.script.training_step(job, unet, batch, objective, metrics)
        master_weights.accumulate()

    run = make_recorder(bench, micro_batch, master_weights, metrics) if static else micro_batch

    def step(index: int) -> torch.Tensor:
        metrics.loss.zero_()
        for batch in batches(index):
            run(batch)
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(master_weights.flat_parameters(), config.train.max_grad_norm)
        scaler.step(optimizer)
        scaler.update()
        master_weights.refresh()
        master_weights.zero_grad()
        return metrics.loss.clone()

    return step


def make_recorder(
    bench: Bench, micro_batch: Callable[[Batch], None], master_weights: MasterWeights, metrics: LossSum
) -> Recorder:
    """What runs micro-batches from recordings, as recorded_step.prepare makes it; UserError from the step where it cannot."""
    buffers = StepBuffers(
        gradients=[flat.grad for flat in master_weights.flat_parameters()],
        losses=metrics.losses,
        others=[metrics.loss],
        discard=master_weights.discard,
        require_in_place=master_weights.require_in_place,
    )

    def refused(line: str) -> None:
        raise UserError(f"the micro-batch cannot be timed as a recording: {line}.")

    graphs = CudaGraphs(bench.device) if bench.device.type == "cuda" else Rerun(buffers.all)
    return Recorder(micro_batch, buffers, graphs, say=refused)


def as_peft(bench: Bench, unet: torch.nn.Module, batches: Callable[[int], Any]) -> Step:
    """The same step with adapters as peft's `get_peft_model` makes them on a bf16 UNet: fp32, with casts in each layer."""
    # A job of its own: the loss scaler belongs to one variant.
    config, objective, job = bench.config, make_objective(bench), replace(bench.job)
    scaler = job.scaler
    parameters = list(adapter_parameters({"unet": unet}).values())
    optimizer = optim.make_optimizer(config.optimizer.name, parameters, config.optimizer.lr, {})

    def step(index: int) -> torch.Tensor:
        metrics = LossSum(bench.device, config.train.batch_size)
        for batch in batches(index):
            bench.script.training_step(job, unet, batch, objective, metrics)
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(parameters, config.train.max_grad_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return metrics.loss

    return step


def with_caches(bench: Bench, unet: torch.nn.Module) -> Step:
    """Reads the batches from the caches with the training script's loader."""
    # No noise is prefetched: both variants sample it within the step, so they differ only in the caches.
    loader = make_loader(bench, ahead=())
    bench.finish.callback(loader.close)
    return with_master_weights(bench, unet, loader.step)


def make_loader(bench: Bench, ahead: Sequence[str]) -> Loader:
    """The training script's loader for a single process."""
    size = bench.config.train.batch_size
    return Loader(
        bench.items,
        bench.sampler,
        bench.caches,
        batch_size=size,
        rank=0,
        world=1,
        device=bench.device,
        sets=sets_of(bench.config),
        ahead=ahead,
    )


def without_caches(bench: Bench, unet: torch.nn.Module) -> Step:
    """Makes the same batches from the image files and captions within the step."""
    vae = loading.load_vae(bench.base, bench.caches.vae_dtype, bench.device)
    text = bench.model.load_text(bench.base, bench.device)

    def batches(index: int) -> Iterator[Batch]:
        for samples in bench.sampler.share(index, bench.config.train.batch_size, 0, 1):
            yield encode_batch(bench, vae, text, samples)

    return with_master_weights(bench, unet, batches)


@torch.no_grad()
def encode_batch(bench: Bench, vae: Any, text: Any, samples: Sequence[StepSample]) -> Batch:
    """The batch that the loader reads for these samples (without flips), but encoded here.

    The VAE encodes the images together. The caches encode each alone, so with more than one image the last bits differ.
    """
    items = [bench.items[sample.index] for sample in samples]
    pixels = [images.resize_and_crop(images.decode(item.sample.load()), item.geometry, False) for item in items]
    # With this memory layout the VAE gives the same bits as in the caches; with another one the last bits differ.
    stacked = torch.stack([torch.tensor(image).permute(2, 0, 1) for image in pixels]).to(bench.device)
    posterior = vae.encode(stacked.to(vae.dtype) / 127.5 - 1.0).latent_dist
    rows = [
        bench.model.encode_caption(text, i.sample.caption, bench.caches.chunks, **bench.caches.text_settings)[0]
        for i in items
    ]
    return Batch(
        mean=posterior.mean.half(),
        std=posterior.std.half(),
        text={name: torch.stack([row[name].half() for row in rows]) for name in rows[0]},
        time_ids=conditioning.time_ids([i.geometry.time_ids(False, "image") for i in items]).to(bench.device),
        loss_weights=torch.ones(len(items), device=bench.device),
        names=tuple(item.sample.name for item in items),
        keys=tuple((sample.epoch, *item.identity) for sample, item in zip(samples, items, strict=True)),
        seed=bench.sampler.seed,
        device=bench.device,
        prefetched={},
    )


def in_memory(bench: Bench) -> Callable[[int], list[Batch]]:
    """Batches read once before the timing and then reused, for pairs that do not test the data pipeline."""
    loader = make_loader(bench, ahead=("posterior", "noise"))
    ready = [list(loader.step(index)) for index in range(len(bench.items))]
    loader.close()
    return lambda index: ready[index % len(ready)]


@dataclass(frozen=True)
class VariantPair:
    """Two variants, the words for each in "a step A takes 1.5 times as long as one B", and the precision."""

    a: str
    build_a: Callable[[Bench, torch.nn.Module], Step]
    b: str
    build_b: Callable[[Bench, torch.nn.Module], Step]
    precision: str = "auto"


def _variant(**options: Any) -> Callable[[Bench, torch.nn.Module], Step]:
    """The script's step on batches in memory, with options of `with_master_weights`."""
    return lambda bench, unet: with_master_weights(bench, unet, in_memory(bench), **options)


PAIRS = {
    "caches": VariantPair("without caches", without_caches, "with caches", with_caches),
    "adapter": VariantPair(
        "with fp32 adapters as peft makes them",
        lambda bench, unet: as_peft(bench, unet, in_memory(bench)),
        "with fp32 master weights and a bf16 working copy",
        _variant(),
        precision="bf16",
    ),
    "same": VariantPair(
        "of the first of two equal variants",
        _variant(),
        "of the second",
        _variant(),
    ),
    "optimizer": VariantPair(
        "whose optimizer gets single tensors", _variant(single=True), "whose optimizer gets one flat tensor", _variant()
    ),
    "recorded": VariantPair("launched by Python", _variant(), "from a recording", _variant(static=True)),
    "feed_forward": VariantPair(
        "that recomputes feed-forward layers", _variant(recompute="feed_forward"), "that recomputes nothing", _variant()
    ),
    "checkpointing": VariantPair(
        "that recomputes all blocks", _variant(recompute="all"), "that recomputes nothing", _variant()
    ),
}
