"""Makes the plan of a run (`run_plan.Plan`), computed before it starts."""

from __future__ import annotations

import math

import numpy as np

from sushi_research.adapters.settings import settings_of
from sushi_research.caches.inputs import Inputs
from sushi_research.config.text_encoders import is_in_step
from sushi_research.data import dataset
from sushi_research.fast.decision import decide
from sushi_research.files import write_json
from sushi_research.models import loading
from sushi_research.precision import dtype_policy
from sushi_research.runs.job import Job
from sushi_research.sampling import prompts as sample_prompts
from sushi_research.training import (
    adapter_plan,
    averages_plan,
    hub_upload,
    optimizer_plan,
    schedules,
    starting_point,
    text_encoder_plan,
)
from sushi_research.training.caption_plan import caption_plan
from sushi_research.training.cost_plan import cost_plan, may_trace
from sushi_research.training.disk_plan import cache_bytes, plan_run, require_room, rooms_of, text_bytes
from sushi_research.training.evaluation_plan import plan_evaluation
from sushi_research.training.length import decay_steps, due_of, steps_of, warmup_steps
from sushi_research.training.new_tokens import plan_of as plan_of_tokens
from sushi_research.training.objective_plan import objective_plan
from sushi_research.training.parameter_groups import Rates, groups_of
from sushi_research.training.plan_parts import (
    CachePlan,
    base_weights_of,
    checkpoints_of,
    device_of,
    repeats_by_folder,
    samples_of,
    speed_of,
    there_already,
)
from sushi_research.training.run_plan import Plan
from sushi_research.training.sampler import Sampler
from sushi_research.training.sets_plan import sets_of_data
from sushi_research.training.step_costs import StepCosts
from sushi_research.training.trainable import adapter_shapes, require_trainable


def make_plan(job: Job, inputs: Inputs) -> Plan:
    """Makes the plan of the job. The main process prints it; of a dry run it also writes plan.json and data_report.json.

    Raises UserError for an optimizer or schedule that cannot be used, for adapter targets that match no module, for a file of
    lora.start_from that was trained on held-out images, and for a disk that has too little room.
    """
    config, base, data, caches = job.config, inputs.base, inputs.data, inputs.caches
    starting_point.require_usable(job, data, base.prediction)
    items, global_batch_size = data.items, job.global_batch_size
    steps = steps_of(config.train.steps, config.train.epochs, len(items), global_batch_size)
    unet = loading.empty_unet(base)
    base_weights = base_weights_of(job, unet)
    adapter_plan.require_effective(job, base, unet)
    shapes = adapter_shapes(unet, settings_of(config.lora, seed=0), job.start and job.start.matches["unet"])
    of_text = text_encoder_plan.shapes_of(job, base)
    all_shapes = shapes | of_text
    warmup = warmup_steps(config.schedule.warmup, steps, len(items), global_batch_size)
    decay = 0
    if config.schedule.name == "wsd":
        decay = decay_steps(config.schedule.decay, steps, len(items), global_batch_size, warmup)
    learning_rate = schedules.of_run(config, steps, warmup, decay)
    due = due_of(config, steps, len(items), global_batch_size)
    own = text_encoder_plan.own_rates(job, steps, len(items))
    groups = groups_of(all_shapes, config, own)
    require_trainable(job, unet, steps, learning_rate, all_shapes, groups)
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
        decay=decay,
        due=due,
        adapter=adapter_plan.plan_of(job, base, unet, all_shapes),
        rates=Rates(config.optimizer.lr, tuple(groups)),
        optimizer=optimizer_plan.plan_of(config.optimizer, config.schedule, all_shapes),
        objective=objective_plan(config, base.prediction),
        text_encoders=text_encoder_plan.plan_of(job, base, of_text, own, steps),
        new_tokens=plan_of_tokens(job, inputs),
        averages=averages_plan.plan_of(job, steps, due, parameters),
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
        job.say(f"upload       {hub_upload.describe(repository, is_average=config.ema.evaluate)}")
    if job.dry_run and job.is_main:
        with job.dry_run.optional():
            dataset.write_report(data.scan, job.dry_run.data_report, data.evaluation_scan, data.prior_scan)
            write_json(job.dry_run.plan, plan.to_json())
            job.say(f"files        {job.dry_run.plan} and data_report.json have all of this")
        if found := there_already(job, steps):
            job.say(f"run          {found}")
    require_room(job, plan.disk, plan.rooms)
    return plan
