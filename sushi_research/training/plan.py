"""The plan: what a run will do, in numbers, before it does it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any

import torch
from accelerate import Accelerator

from sushi_research import conditioning
from sushi_research.adapters import lora
from sushi_research.caches.caches import Caches
from sushi_research.config import TrainingConfig
from sushi_research.data.samples import Item
from sushi_research.data.training_data import Data, drift_captions
from sushi_research.errors import UserError
from sushi_research.models import loading
from sushi_research.models.components import build_empty
from sushi_research.models.prediction import Prediction
from sushi_research.reports.statistics import MIN_IMAGES
from sushi_research.runs import tracking
from sushi_research.training import optim
from sushi_research.training.precision import dtype_policy
from sushi_research.training.sampler import Sampler


def steps_of(steps: int | None, epochs: int | None, items: int, samples_per_step: int) -> int:
    """The optimizer steps of a run: given, or the whole steps that show every item at least `epochs` times."""
    return steps if steps is not None else -(-epochs * items // samples_per_step)


def make_plan(
    config: TrainingConfig,
    base: loading.Base,
    model: ModuleType,
    data: Data,
    sampler: Sampler,
    caches: Caches,
    captions: Sequence[str],
    precision: str,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """The plan as plain numbers (plan.json); the main process prints it too.

    UserError for an optimizer or a schedule that cannot be built, and for adapter targets that fit nothing.
    """
    items, group = data.items, sampler.samples_per_step
    steps = steps_of(config.train.steps, config.train.epochs, len(items), group)
    require_trainable(config, steps)
    # One epoch tells the fill of them all: epochs differ in their order and in where their tail falls.
    epoch_steps = range(min(steps, max(1, len(items) // group)))
    micro_batches = sum(len(sampler.micro_batches(step, config.train.batch_size)) for step in epoch_steps)
    entries = {caches.latent_key(item, flip): item.bucket for item in items for flip in caches.flips}
    entries |= {caches.latent_key(item, False): item.bucket for item in data.held_out}
    modules, parameters = count_adapter(base, config.lora.targets, config.lora.rank)
    text_bytes = 2 * sum(math.prod(shape) for shape in model.text_shapes(base).values())
    images = len({item.sample.name for item in items})
    plan = {
        "architecture": model.NAME,
        "base": {
            "source": base.source,
            "prediction_type": base.prediction.type,
            "zero_terminal_snr": base.prediction.zero_terminal_snr,
            "not_used": dict(base.ignored),
        },
        "images": images,
        "items_per_epoch": len(items),
        "buckets": {f"{w}x{h}": count for (h, w), count in sorted(Counter(item.bucket for item in items).items())},
        "left_out": [{"name": problem.name, "reason": problem.reason} for problem in data.scan.problems],
        "captions_cut": captions_cut(base, model, [*items, *data.held_out]),
        "evaluation": evaluation_plan(config, data, steps),
        "samples_per_step": group,
        "split": {
            "batch_size": config.train.batch_size,
            "accumulation": config.train.accumulation,
            "processes": accelerator.num_processes,
        },
        "micro_batch_fill": round(len(epoch_steps) * group / (micro_batches * config.train.batch_size), 3),
        "steps": steps,
        "samples": steps * group,
        "epochs": round(steps * group / len(items), 2),
        "samples_per_image": round(steps * group / images, 1),
        "trainable_parameters": parameters,
        "adapter_modules": modules,
        "dtypes": dtype_policy(precision, optimizer=config.optimizer.name, vae=caches.vae_dtype).describe(),
        "cache": {
            "images": {
                "needed": len(entries),
                "missing": len(caches.missing_latents(data)),
                # Mean and standard deviation, 4 channels at an eighth of each side, 2 bytes a value.
                "bytes": sum(2 * 4 * (height // 8) * (width // 8) * 2 for height, width in entries.values()),
            },
            "captions": {
                "needed": len(captions),
                "missing": len(caches.missing_captions(captions)),
                "bytes": text_bytes * len(captions),
            },
        },
    }
    accelerator.print(describe_plan(plan))
    return plan


def evaluation_plan(config: TrainingConfig, data: Data, steps: int) -> dict[str, Any] | None:
    """What the run is evaluated on and how often; None where it is not."""
    if not data.held_out:
        return None
    every = config.evaluation.every
    return {
        "images": len({(item.sample.image_hash, item.sample.caption) for item in data.held_out}),
        "source": config.evaluation.path or f"held out of {config.data.path}",
        "draws": config.evaluation.draws,
        "evaluations": 2 + ((steps - 1) // every if every else 0),
        "drift_captions": len(drift_captions(config, data)),
        "look_alikes": data.look_alikes,
    }


def require_trainable(config: TrainingConfig, steps: int) -> None:
    """Builds an optimizer and a schedule for a look, and looks for xformers and W&B where they are asked for: a mistake in
    them is told now, not when everything is encoded.

    UserError as `optim.build_optimizer`, `optim.make_schedule`, `loading.require_xformers` and `tracking.resolve_trackers`
    raise it.
    """
    if config.train.attention == "xformers":
        loading.require_xformers()
    tracking.resolve_trackers(config.tracking.wandb, config.tracking.tensorboard)
    look, schedule = torch.nn.Parameter(torch.zeros(1)), config.schedule
    optim.build_optimizer(config.optimizer.name, [look], config.optimizer.lr, config.optimizer.kwargs)
    optim.make_schedule(
        schedule.name,
        lr=config.optimizer.lr,
        total_steps=steps,
        warmup=schedule.warmup,
        cycles=schedule.cycles,
        power=schedule.power,
    )


def captions_cut(base: loading.Base, model: ModuleType, items: Iterable[Item]) -> dict[str, int]:
    """How many tokens beyond 77 each caption loses, for those that lose any."""
    captions = sorted({item.sample.caption for item in items})
    cut: dict[str, int] = {}
    for name in model.TEXT_ENCODERS:
        tokens = conditioning.tokenize(base.load_tokenizer(name), captions)
        for caption, lost in zip(captions, tokens.cut, strict=True):
            if lost:
                cut[caption] = max(lost, cut.get(caption, 0))
    return cut


def count_adapter(base: loading.Base, targets: str | Sequence[str], rank: int) -> tuple[int, int]:
    """(modules, trainable parameters) of an adapter: attached for a look to the base's UNet without its weights."""
    try:
        unet = build_empty("unet", base.config("unet"))
    except ValueError as error:
        raise UserError(
            f"the config of {base.parts['unet'].where} describes no UNet ({error}): download the model again."
        ) from error
    lora.attach(unet, targets=targets, rank=rank, alpha=rank, dropout=0.0, init="default", seed=0)
    return len(lora.adapter_modules(unet)), lora.count_parameters(unet)


def describe_plan(plan: dict[str, Any]) -> str:
    """The plan as a person reads it."""
    split, cache, dtypes = plan["split"], plan["cache"], plan["dtypes"]
    buckets = ", ".join(f"{name} ({count})" for name, count in plan["buckets"].items())
    known = plan["base"]
    predicts = Prediction(known["prediction_type"], known["zero_terminal_snr"]).describe()
    unused = f"; {len(known['not_used'])} keys of it are not needed (see plan.json)" if known["not_used"] else ""
    lines = [
        f"base         {known['source']}: {plan['architecture']}, predicts {predicts}{unused}",
        f"images       {plan['images']} ({plan['items_per_epoch']} per epoch with repeats)",
        f"buckets      {len(plan['buckets'])}: {buckets}",
        f"step         {plan['samples_per_step']} samples = batch {split['batch_size']} x accumulation "
        f"{split['accumulation']} x processes {split['processes']}; micro-batches {plan['micro_batch_fill']:.0%} full",
        f"length       {plan['steps']} optimizer steps = {plan['samples']} samples = {plan['epochs']} epochs; "
        f"each image {plan['samples_per_image']} times",
        f"adapter      {plan['adapter_modules']} modules, {plan['trainable_parameters']:,} trainable parameters",
        f"precision    {dtypes['frozen UNet weights']} weights and activations, {dtypes['adapter, masters']} adapter masters, "
        f"optimizer state {dtypes['optimizer state']}, {dtypes['VAE']} VAE",
        f"cache        {cache['images']['missing']} of {cache['images']['needed']} image entries to encode "
        f"({_size(cache['images']['bytes'])} in all), {cache['captions']['missing']} of "
        f"{cache['captions']['needed']} captions ({_size(cache['captions']['bytes'])})",
    ]
    lines += _describe_evaluation(plan["evaluation"])
    if plan["captions_cut"]:
        worst = max(plan["captions_cut"].values())
        lines.append(
            f"captions     {len(plan['captions_cut'])} longer than 77 tokens are cut (the longest loses {worst}); see plan.json"
        )
    if plan["left_out"]:
        lines.append(f"left out     {len(plan['left_out'])}:")
        lines += [f"             {problem['name']}: {problem['reason']}" for problem in plan["left_out"][:10]]
        if len(plan["left_out"]) > 10:
            lines.append(f"             and {len(plan['left_out']) - 10} more, see plan.json")
    return "\n".join(lines)


def _describe_evaluation(plan: dict[str, Any] | None) -> list[str]:
    if plan is None:
        return [
            "evaluation   none: --evaluation.held_out 0.1, or --evaluation.path with held-out images, tells what is learned"
        ]
    few = f"; a verdict between runs needs {MIN_IMAGES} images or more" if plan["images"] < MIN_IMAGES else ""
    lines = [
        f"evaluation   {plan['images']} images ({plan['source']}) x {plan['draws']} draws, and the drift on "
        f"{plan['drift_captions']} captions, {plan['evaluations']} times{few}"
    ]
    lines += [f"             warning: {sentence}" for sentence in plan["look_alikes"][:5]]
    if len(plan["look_alikes"]) > 5:
        lines.append(f"             and {len(plan['look_alikes']) - 5} more, see plan.json")
    return lines


def _size(count: int) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
