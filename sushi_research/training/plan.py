"""The plan of a run: what it will do, in numbers, computed before it starts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from sushi_research.adapters.settings import settings_of
from sushi_research.caches.inputs import Inputs
from sushi_research.config.section import plural, steps_text
from sushi_research.config.text_encoders import is_in_step
from sushi_research.data import dataset, findings
from sushi_research.data.scan import Problem
from sushi_research.errors import printable
from sushi_research.fast.decision import StepPath, decide
from sushi_research.files import write_json
from sushi_research.models import loading
from sushi_research.models.prediction import Prediction
from sushi_research.precision import DtypePolicy, dtype_policy
from sushi_research.runs.job import Job
from sushi_research.runs.measured import Measured
from sushi_research.sampling import prompts as sample_prompts
from sushi_research.training import adapter_plan, hub_upload, starting_point, text_encoder_plan
from sushi_research.training.adapter_plan import AdapterPlan
from sushi_research.training.caption_plan import CaptionPlan, caption_plan
from sushi_research.training.cost_plan import CostPlan, cost_plan, may_trace
from sushi_research.training.disk_plan import (
    DiskPlan,
    Room,
    cache_bytes,
    plan_run,
    require_room,
    rooms_of,
    text_bytes,
)
from sushi_research.training.evaluation_plan import EvaluationPlan, plan_evaluation
from sushi_research.training.length import Due, due_of, steps_of, warmup_steps
from sushi_research.training.new_tokens import TokenPlan
from sushi_research.training.new_tokens import plan_of as plan_of_tokens
from sushi_research.training.parameter_groups import Rates, groups_of
from sushi_research.training.plan_parts import (
    BaseWeights,
    CachePlan,
    CheckpointPlan,
    DevicePlan,
    Repeats,
    SamplePlan,
    base_weights_of,
    checkpoints_of,
    describe_repeats,
    describe_speed,
    device_of,
    repeats_by_folder,
    samples_of,
    speed_of,
    there_already,
)
from sushi_research.training.sampler import Sampler
from sushi_research.training.sets_plan import SetPlan, describe_sets, sets_of_data
from sushi_research.training.step_costs import StepCosts
from sushi_research.training.text_encoder_plan import TextEncoderPlan
from sushi_research.training.trainable import adapter_shapes, require_trainable


@dataclass(frozen=True)
class Plan:
    """What a run will do. `unused` maps keys of a single-file base that no component needs to the reason."""

    architecture: str
    device: DevicePlan
    base: str
    base_weights: BaseWeights
    prediction: Prediction
    unused: Mapping[str, str]
    images: int
    items_per_epoch: int
    sets: tuple[SetPlan, ...]
    repeats: tuple[Repeats, ...]
    buckets: Mapping[str, int]
    problems: Sequence[Problem]
    notes: tuple[str, ...]
    captions: CaptionPlan
    sampling: SamplePlan | None
    checkpoints: CheckpointPlan
    evaluation: EvaluationPlan | None
    step_path: StepPath
    batch_size: int
    accumulation: int
    processes: int
    micro_batch_fill: float
    steps: int
    warmup: int
    due: Due
    adapter: AdapterPlan
    rates: Rates
    text_encoders: TextEncoderPlan | None
    new_tokens: TokenPlan | None
    dtypes: DtypePolicy
    image_cache: CachePlan
    caption_cache: CachePlan
    mask_cache: CachePlan
    disk: DiskPlan
    rooms: tuple[Room, ...]
    cost: CostPlan
    speed: Measured | None
    run_folder: str

    @property
    def global_batch_size(self) -> int:
        """The samples of one optimizer step."""
        return self.batch_size * self.accumulation * self.processes

    @property
    def split(self) -> dict[str, int]:
        """The factors of the global batch size."""
        return {"batch_size": self.batch_size, "accumulation": self.accumulation, "processes": self.processes}

    @property
    def samples(self) -> int:
        return self.steps * self.global_batch_size

    @property
    def epochs(self) -> float:
        return round(self.samples / self.items_per_epoch, 2)

    @property
    def samples_per_image(self) -> float:
        return round(self.samples / self.images, 1)

    def to_json(self) -> dict[str, Any]:
        """The content of plan.json."""
        return {
            "architecture": self.architecture,
            "device": asdict(self.device),
            "base": {
                "source": self.base,
                "prediction_type": self.prediction.type,
                "zero_terminal_snr": self.prediction.zero_terminal_snr,
                "not_used": dict(self.unused),
                "weights": asdict(self.base_weights),
            },
            "images": self.images,
            "items_per_epoch": self.items_per_epoch,
            "sets": [asdict(each) for each in self.sets],
            "repeats": [asdict(each) for each in self.repeats],
            "buckets": dict(self.buckets),
            "skipped": [
                {"name": problem.name, "reason": problem.reason} for problem in self.problems[: findings.LISTED]
            ],
            "captions_cut": dict(self.captions.listed),
            "captions": self.captions.to_json(),
            "sampling": asdict(self.sampling) if self.sampling else None,
            "checkpoints": asdict(self.checkpoints),
            "evaluation": asdict(self.evaluation) if self.evaluation else None,
            "global_batch_size": self.global_batch_size,
            "split": self.split,
            "step_path": self.step_path.name,
            "micro_batch_fill": self.micro_batch_fill,
            "steps": self.steps,
            "warmup_steps": self.warmup,
            "samples": self.samples,
            "epochs": self.epochs,
            "samples_per_image": self.samples_per_image,
            "trainable_parameters": self.adapter.parameters,
            "adapter_modules": self.adapter.modules,
            "not_loaded": self.adapter.not_loaded,
            "rates": self.rates.to_json(),
            "text_encoders": self.text_encoders.to_json() if self.text_encoders else None,
            "new_tokens": self.new_tokens.to_json() if self.new_tokens else None,
            "dtypes": self.dtypes.describe(),
            "cache": {
                "images": asdict(self.image_cache),
                "captions": asdict(self.caption_cache),
                "masks": asdict(self.mask_cache),
            },
            "disk": self.disk.to_json(),
            "cost": self.cost.to_json(),
            "speed": asdict(self.speed) if self.speed else None,
            # As it was printed, for the run's page.
            "text": self.describe().split("\n"),
        }

    def describe(self) -> str:
        """The plan as text for the terminal."""
        dtypes, device = self.dtypes.describe(), self.device
        buckets = ", ".join(f"{name} ({count})" for name, count in self.buckets.items())
        unused = f"; {len(self.unused)} keys of it are not needed (a run's plan.json lists them)" if self.unused else ""
        warmup = f"; warm-up {steps_text(self.warmup)}" if self.warmup else ""
        lines = [
            f"base         {self.base}: {self.architecture}, predicts {self.prediction.describe()}{unused}",
            f"device       {device.describe()}",
            f"precision    {device.precision} ({device.precision_reason}): {dtypes['activations']} weights and "
            f"activations, {dtypes['adapter, master weights']} adapter master weights, "
            f"optimizer state {dtypes['optimizer state']}, {dtypes['VAE']} VAE",
            *self.base_weights.describe(),
            f"images       {self.images} ({self.items_per_epoch} per epoch with repeats)",
            *describe_sets(self.sets),
            *describe_repeats(self.repeats),
            f"buckets      {len(self.buckets)}: {buckets}",
            f"step         {self.global_batch_size} samples = batch {self.batch_size} x accumulation "
            f"{self.accumulation} x processes {self.processes}; micro-batches {self.micro_batch_fill:.0%} full",
            f"recording    {self.step_path.describe()}",
            f"length       {self.steps} optimizer step{plural(self.steps)} = {self.samples} sample{plural(self.samples)} = "
            f"{self.epochs} epochs; "
            f"each image {self.samples_per_image} times{' on average' if self.repeats or len(self.sets) > 1 else ''}{warmup}",
            *self.adapter.describe(),
            *self.rates.describe(),
            *(self.text_encoders.describe() if self.text_encoders else ()),
            *(self.new_tokens.describe() if self.new_tokens else ()),
            *self.cost.describe(),
            f"cache        {self.image_cache.describe('image entries', ' to encode')}, {self.caption_cache.describe('captions')}"
            + (f", {self.mask_cache.describe('masks')}" if self.mask_cache.needed else ""),
            f"disk         {self.disk.parts()}; {'; '.join(room.describe() for room in self.rooms)}",
            *(self.sampling.describe() if self.sampling else ["samples      none: sample.enabled is false"]),
            *self.checkpoints.describe(),
        ]
        lines += (
            self.evaluation.describe()
            if self.evaluation
            else [
                "evaluation   none: --evaluation.held_out 0.1, or --evaluation.path with held-out images, measures what is learned"
            ]
        )
        lines += self.captions.describe()
        estimate = self.cost.step_seconds(self.accumulation)
        lines.append(describe_speed(self.speed, estimate, self.steps, self.global_batch_size, self.run_folder))
        lines += findings.lines(self.problems, self.notes)
        return "\n".join(printable(line) for line in lines)


def make_plan(job: Job, inputs: Inputs) -> Plan:
    """Makes the plan of the job. The main process prints it; of a dry run it also writes plan.json and data_report.json.

    Raises UserError for an optimizer or schedule that cannot be used, for adapter targets that match no module, for a file of
    lora.start_from that was trained on held-out images, and for a disk that has too little room.
    """
    config, base, data, caches = job.config, inputs.base, inputs.data, inputs.caches
    starting_point.require_usable(job, data)
    items, global_batch_size = data.items, job.global_batch_size
    steps = steps_of(config.train.steps, config.train.epochs, len(items), global_batch_size)
    unet = loading.empty_unet(base)
    base_weights = base_weights_of(job, unet)
    adapter_plan.require_effective(job, base, unet)
    shapes = adapter_shapes(unet, settings_of(config.lora, seed=0), job.start and job.start.matches["unet"])
    of_text = text_encoder_plan.shapes_of(job, base)
    all_shapes = shapes | of_text
    warmup = warmup_steps(config.schedule.warmup, steps, len(items), global_batch_size)
    due = due_of(config, steps, len(items), global_batch_size)
    own = text_encoder_plan.own_rates(job, steps, len(items))
    groups = groups_of(all_shapes, config, own)
    require_trainable(job, unet, steps, warmup, all_shapes, groups)
    sampler = Sampler(items.bucket_ids, global_batch_size, config.train.seed)
    # One epoch is representative: epochs differ only in their order and in the position of their tail.
    epoch_steps = min(steps, max(1, len(items) // global_batch_size))
    micro_batches = sampler.count_micro_batches(epoch_steps, config.train.batch_size)
    parameters = sum(map(math.prod, all_shapes.values()))
    missing, missing_chunks = inputs.missing_latents(), inputs.missing_text_chunks()
    images = sample_prompts.of_run(config, inputs.prompts)
    sample_prompts.require_few_chunks(images, inputs.long_prompts)
    disk = plan_run(job, cache_bytes(job, inputs, missing, missing_chunks), steps, due, parameters, images)
    captions = caption_plan(job, inputs, text_bytes(job, inputs))
    costs = StepCosts(job, base, all_shapes, data.remembered, captions.encoders, may_trace=may_trace(job))
    plan = Plan(
        architecture=job.model.NAME,
        device=device_of(job),
        base=base.source,
        base_weights=base_weights,
        prediction=base.prediction,
        unused=base.ignored,
        images=len(items.used),
        items_per_epoch=len(items),
        sets=sets_of_data(data),
        repeats=() if config.data.sets else repeats_by_folder(items),
        buckets={
            f"{w}x{h}": int(count) for (h, w), count in zip(items.buckets, np.bincount(items.bucket_ids), strict=True)
        },
        problems=data.problems,
        notes=tuple(data.notes),
        captions=captions,
        sampling=samples_of(job, inputs, steps, due),
        checkpoints=checkpoints_of(job, steps, due),
        evaluation=plan_evaluation(config, inputs, steps, due.evaluation),
        step_path=decide(config, job.device),
        batch_size=config.train.batch_size,
        accumulation=config.train.accumulation,
        processes=job.world,
        micro_batch_fill=round(epoch_steps * global_batch_size / (micro_batches * config.train.batch_size), 3),
        steps=steps,
        warmup=warmup,
        due=due,
        adapter=adapter_plan.plan_of(job, base, unet, all_shapes),
        rates=Rates(config.optimizer.lr, tuple(groups)),
        text_encoders=text_encoder_plan.plan_of(job, base, of_text, own, steps),
        new_tokens=plan_of_tokens(job, inputs),
        dtypes=dtype_policy(
            job.precision,
            optimizer=config.optimizer.name,
            optimizer_kwargs=config.optimizer.kwargs,
            numbers=[sum(math.prod(all_shapes[name]) for name in group.names) for group in groups],
            vae=caches.vae_dtype,
            storage=config.model.base_storage,
            trains_text=is_in_step(config.text_encoders),
        ),
        image_cache=CachePlan(
            needed=len(inputs.latent_entries),
            missing=len(missing),
            bytes=inputs.latent_entries.bytes,
        ),
        caption_cache=CachePlan(
            needed=len(inputs.text_chunks),
            missing=len(missing_chunks),
            bytes=text_bytes(job, inputs) * int(inputs.text_chunks.sum()),
        ),
        mask_cache=CachePlan(
            needed=len(inputs.mask_entries),
            missing=len(inputs.missing_masks()),
            bytes=inputs.mask_entries.bytes,
        ),
        disk=disk,
        rooms=tuple(rooms_of(job, disk)),
        cost=cost_plan(job, inputs, costs, images, base_bytes=base_weights.compute_bytes),
        speed=speed_of(job, parameters),
        run_folder=config.run.folder,
    )
    job.say(*plan.describe().split("\n"))
    if command := config.checkpoint.command:  # not a part of the plan, whose file is in the run folder
        job.say(f"command      after each checkpoint: {command}")
    if repository := config.run.push_to_hub:
        job.say(f"upload       {hub_upload.describe(repository)}")
    if job.dry_run and job.is_main:
        with job.dry_run.optional():
            dataset.write_report(data.scan, job.dry_run.data_report, data.evaluation_scan, data.prior_scan)
            write_json(job.dry_run.plan, plan.to_json())
            job.say(f"files        {job.dry_run.plan} and data_report.json have all of this")
        if found := there_already(job, steps):
            job.say(f"run          {found}")
    require_room(job, plan.disk, plan.rooms)
    return plan
