"""Trains an SDXL LoRA on a folder (or HF dataset) of captioned images.

    accelerate launch scripts/train_sdxl_lora.py --config configs/sdxl_lora.yaml --data.path photos --dry-run
    accelerate launch scripts/train_sdxl_lora.py --config configs/sdxl_lora.yaml --data.path photos

Running the same command again continues the run. `--help` lists every option; docs/models/sdxl.md is the reference.
B is the number of samples in a micro-batch. G is the global batch size: batch size x accumulation x processes. The code
between `--- shared ---` marks is identical in all training scripts (tests/scripts/test_alignment.py checks it). What differs
is the config class, the model module, the arguments of `model.predict`, and SDXL's time_ids in the loader.
"""

from __future__ import annotations

from sushi_research.config import SDXLTraining
from sushi_research.config.process import read_command_line, run_main

INTRO = """\
This trains an SDXL LoRA on your captioned images. To begin:
  see it work:    make demo
  the plan:       accelerate launch scripts/train_sdxl_lora.py --config configs/sdxl_lora.yaml --data.path photos --dry-run
  the training:   accelerate launch scripts/train_sdxl_lora.py --config configs/sdxl_lora.yaml --data.path photos
  every option:   python scripts/train_sdxl_lora.py --help"""

if __name__ == "__main__":
    # Before the imports below, so that --help and config errors do not wait for torch.
    CONFIG = read_command_line(SDXLTraining, script="scripts/train_sdxl_lora.py", intro=INTRO)

# --- shared: imports ---
import contextlib

import torch
from torch import nn

from sushi_research import objectives
from sushi_research.adapters import lora
from sushi_research.adapters.settings import settings_of
from sushi_research.caches.caches import open_caches, open_hash_cache, open_remembered
from sushi_research.caches.inputs import Inputs, fill_caches
from sushi_research.data.training_data import read_data
from sushi_research.fast import checkpointing
from sushi_research.fast.batch import Batch
from sushi_research.files import system_errors
from sushi_research.models import loading
from sushi_research.models.loading import find_base
from sushi_research.objectives import Objective
from sushi_research.runs import tracking
from sushi_research.runs.job import Job
from sushi_research.runs.launch import one_report
from sushi_research.sampling import sample_grids
from sushi_research.stopping import StopRequest
from sushi_research.training import (
    best_adapter,
    evaluating,
    optim,
    page_output,
    recorded_step,
    resume,
    run,
    schedules,
    text_encoders,
)
from sushi_research.training.adapter_output import AdapterWriter
from sushi_research.training.averages import averages_of
from sushi_research.training.batch_text import make_batch_text
from sushi_research.training.loader import Loader
from sushi_research.training.master_weights import MasterWeights
from sushi_research.training.max_norm import limit_of
from sushi_research.training.memory_choice import fit_memory
from sushi_research.training.plan import make_plan
from sushi_research.training.sampler import Sampler
from sushi_research.training.saving import Saver
from sushi_research.training.state import TrainState
from sushi_research.training.step_metrics import StepMetrics
from sushi_research.training.text_encoders import CACHED, TextEncoders
from sushi_research.training.training_bar import TrainingBar

# --- end shared ---
from sushi_research.models import sdxl as model  # isort: skip


def training_step(
    job: Job, unet: nn.Module, batch: Batch, objective: Objective, metrics: StepMetrics, encode: TextEncoders = CACHED
) -> None:
    """One micro-batch of B samples: add noise, predict, compute the weighted loss, add its gradients to the step's."""
    schedule = objective.schedule
    timesteps = objectives.draw_timesteps(batch, objective.timesteps)  # [B]
    noise = objectives.draw_noise(batch, objective.noise)  # [B, 4, H/8, W/8] fp32
    latents = objectives.posterior_sample(batch.mean, batch.std, batch.normal("posterior"), model.SCALING_FACTOR)
    added = objectives.perturb_input(noise, batch, objective.noise)  # the same, unless there is input perturbation
    noisy = objectives.add_noise(latents, added, timesteps, schedule)
    times = schedule.times[timesteps]  # what the UNet is given as its timestep
    prediction = model.predict(unet, noisy, times, encode(batch.text), batch.time_ids, dtype=job.compute_dtype)
    # The target is what the base predicts: the noise, v, or the direction of rectified flow.
    target = objectives.target(latents, noise, timesteps, schedule, objective.prediction_type)
    if batch.to_base is not None:  # prior preservation: these samples' target is the prediction without the adapter
        with torch.no_grad(), encode.without_adapters(unet):
            of_base = model.predict(unet, noisy, times, encode(batch.text), batch.time_ids, dtype=job.compute_dtype)
        target = objectives.prior_target(target, of_base, batch.to_base)
    losses = objectives.loss_per_sample(prediction, target, timesteps, objective.loss, batch.mask)  # [B] fp32
    weights = batch.loss_weights  # [B] fp32: one, or what the sample's set says
    if objective.weights is not None:  # by timestep, such as min-SNR
        weights = weights * objective.weights[timesteps]
    loss = (losses * weights).sum() / job.global_batch_size  # this micro-batch's part of the step's mean over G samples
    job.scaler.scale(loss).backward()
    metrics.add(loss, losses, objectives.timestep_bin(timesteps))


@one_report()
@system_errors()
def main(config: SDXLTraining) -> int:
    """Runs the training. Returns the exit status: 0, or 128 + the signal number if a signal stopped it early."""
    # --- shared: main ---
    job = run.start_job(config, model, __file__)
    with run.open_run(job) as job:
        try:
            return train(job)
        except torch.OutOfMemoryError as error:
            raise run.out_of_memory(config, error) from error
        finally:
            tracking.end_trackers(job.accelerator)
    # --- end shared ---


def train(job: Job) -> int:
    """The training from start to finish. `job.run` is None for a dry run, which ends after the plan."""
    # --- shared: base, data, plan ---
    config, stop, timings = job.config, StopRequest(note=job.note_stop), job.timings
    hash_cache = open_hash_cache(config)
    base = find_base(config, model)
    data = read_data(job, open_remembered(config))
    job = fit_memory(job, base, data)  # train.memory chooses batch size, accumulation and checkpointing
    config = job.config
    caches = open_caches(job, base, hash_cache)
    inputs = Inputs(config, base, data, caches, hash_cache)
    plan = make_plan(job, inputs)
    if config.dry_run:
        return 0
    # --- end shared ---

    # --- shared: start or resume, fill the caches ---
    run_state = resume.start_or_resume(job, inputs, plan)
    if run_state.nothing_to_do:
        return 0
    timings.enter("caching")
    fill_caches(job, inputs)
    # --- end shared ---

    # --- shared: the adapter on the frozen UNet ---
    # Weights and activations are in the compute dtype. The adapter's master weights, its gradient sum and the loss are in fp32.
    timings.enter("loading")
    unet = loading.load_unet(base, job.compute_dtype, job.device, config.train.attention, config.model.base_storage)
    settings = settings_of(config.lora, config.train.seed)
    lora.attach(unet, settings, start=job.start and job.start.matches["unet"])
    components = {"unet": unet}
    unet.train()
    checkpointing.enable(unet, config.train.gradient_checkpointing, draws=settings.drops)
    encoders = text_encoders.prepare(job, inputs)  # with adapters, if they are trained too
    components |= encoders.components
    groups = plan.rates.groups  # tensors that are trained with one learning rate
    names = [group.names for group in groups]
    master_weights = MasterWeights(lora.adapter_parameters(components), job.compute_dtype, names, idle=encoders.idle)
    optimizer = optim.build_optimizer(
        config.optimizer.name, master_weights, config.optimizer.lr, config.optimizer.kwargs
    )
    limit = limit_of(config.lora.max_norm, master_weights, components)  # of the norm of what is added to each layer
    averages = averages_of(config.ema, master_weights)
    state = TrainState(master_weights, optimizer, job.scaler, groups, limit, averages)
    state.load(run_state.checkpoint)
    learning_rate = schedules.of_run(config, plan.steps, plan.warmup, plan.decay)
    # --- end shared ---

    loader = Loader(
        data.items,
        Sampler(data.items.bucket_ids, job.global_batch_size, config.train.seed),
        caches,
        batch_size=config.train.batch_size,
        rank=job.rank,
        world=job.world,
        device=job.device,
        sets=data.sets,
        time_ids=config.data.time_ids,
        text=make_batch_text(job, inputs, encoders, zeros=config.captions.dropout_to == "zeros"),
        ahead=("posterior", "noise"),
        steps=plan.steps,
    )

    # --- shared: the loop ---
    metrics_file = run.open_trackers(job, run_state)
    metrics = StepMetrics(job)
    objective = objectives.make_objective(config, base.prediction, job.device, dropout=settings.drops)
    evaluator = evaluating.prepare(job, inputs, run_state, unet, encoders)
    writer = AdapterWriter(job, inputs, plan, run_state, state, components)
    saver, best = Saver(writer), best_adapter.prepare(writer)

    def micro_batch(batch: Batch) -> None:
        training_step(job, unet, batch, objective, metrics, encoders)
        master_weights.accumulate()  # adds the working copy's gradients to the fp32 sum, and clears them

    # Recorded as a CUDA graph for each shape of a batch, where that is possible (docs/fast_step.md).
    run_micro_batch = recorded_step.prepare(
        job, run_state, micro_batch, unet=unet, master_weights=master_weights, metrics=metrics, loader=loader
    )
    step, resumed_at, stopping = run_state.step, run_state.step, False
    bar = TrainingBar(job, plan, step)
    with contextlib.ExitStack() as signals, contextlib.closing(loader), contextlib.closing(bar):
        while True:
            # Save, evaluate and sample before the next step. `evaluate` and `generate` skip what the run has already, so a resumed
            # run adds what is missing. A stop interrupts both, and the run then has a checkpoint of its last step.
            first, last = step == 0, step == plan.steps
            saver.save_averages(step)
            if last or stopping or step == resumed_at or plan.due.checkpoint.at(step):
                timings.enter("saving")
                # The checkpoint and the adapter file, before evaluating and sampling, which may run out of memory.
                saver.save(step)
            if stopping:
                break
            to_evaluate = evaluator and (first or last or plan.due.evaluation.at(step))
            to_sample = first or last or plan.due.sample.at(step)
            if to_evaluate or to_sample:
                run_micro_batch.make_room()
                # Averages with ema.evaluate and of schedule-free optimizers; else the weights themselves.
                with saver.saved_if_interrupted(step), state.evaluated_weights(), stop.at_once():
                    if to_evaluate:
                        timings.enter("evaluating")
                        evaluating.evaluate(job, evaluator, unet, step, metrics_file)
                        if best:
                            best.keep(step)
                    if to_sample:
                        timings.enter("sampling")
                        sample_grids.generate(job, inputs, unet, step, encoders.without_adapters, text=encoders.prompt)
                        saver.add_picture(step)
            if (to_evaluate or to_sample or step == resumed_at) and not last:  # `finish` writes the last page
                page_output.write(job, inputs, plan, step)
            if last:
                break

            # One optimizer step: accumulate the gradients of G samples, clip them, apply them.
            if step == resumed_at:
                signals.enter_context(stop)  # from the first step on a signal stops after the step, with a checkpoint
                bar.unpause()  # the first evaluation and samples do not count in its rate
            timings.enter("training")
            if state.freeze_ended(step):  # from here on the text encoders' adapters stay as they are
                encoders.freeze()
                run_micro_batch.forget()
            metrics.start()
            for batch in loader.step(step):
                if objective.dropout:  # the only random numbers from torch's global generator
                    batch.seed_torch("dropout", step)
                run_micro_batch(batch)
                metrics.record(batch.names, batch.roles)
            # One message between the processes: the gradients, the metrics, and whether any process was asked to stop.
            stopping = metrics.sum_over_processes(master_weights, stop=stop.poll(), waited=loader.take_waited())
            metrics.require_finite_loss(step + 1)
            rate = optim.set_learning_rate(optimizer, learning_rate(step), groups, step)
            job.scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(
                master_weights.flat_parameters(), config.train.max_grad_norm or float("inf")
            )
            state.step_optimizer(step + 1, plan.steps)  # fp16 skips a step whose gradients overflowed
            master_weights.refresh()  # rounds them into the working copy that the UNet computes with
            master_weights.zero_grad()
            step += 1
            values = metrics.values(plan, step, rate, norm) | state.metrics()
            tracking.log(job.accelerator, metrics_file, values, step)
            bar.update(step, values["loss"])
    # --- end shared ---

    # --- shared: finish ---
    if stopping:
        run.stopped(job, plan, step)
        return stop.exit_status
    run.finish(job, state, metrics_file, step)
    # --- end shared ---
    return 0


if __name__ == "__main__":
    run_main(main, CONFIG)
