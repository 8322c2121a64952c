"""Trains an SD1.5 LoRA on a folder (or HF dataset) of captioned images.

    accelerate launch scripts/train_sd15_lora.py --config configs/sd15_lora.yaml --data.path photos --dry-run
    accelerate launch scripts/train_sd15_lora.py --config configs/sd15_lora.yaml --data.path photos

Running the same command again continues the run. `--help` lists every option; docs/models/sd15.md is the reference.
B is the samples of a micro-batch; G those of a step: batch size x accumulation x processes. What stands between
`--- shared ---` marks is word for word the same in every training script (tests/scripts/test_alignment.py).
"""

from __future__ import annotations

from sushi_research.config import SD15Training
from sushi_research.config.command_line import read_command_line, run_main

INTRO = """\
This trains an SD1.5 LoRA on your captioned images. To begin:
  see it work:    make demo ARCH=sd15
  the plan:       accelerate launch scripts/train_sd15_lora.py --config configs/sd15_lora.yaml --data.path photos --dry-run
  the training:   accelerate launch scripts/train_sd15_lora.py --config configs/sd15_lora.yaml --data.path photos
  every option:   python scripts/train_sd15_lora.py --help"""

if __name__ == "__main__":
    # Before the imports below: --help and errors in the config do not wait for torch.
    CONFIG = read_command_line(SD15Training, script="scripts/train_sd15_lora.py", intro=INTRO)

# --- shared: imports ---
import contextlib
import time

import torch
from accelerate import Accelerator

from sushi_research import diffusion, randomness
from sushi_research.adapters import lora
from sushi_research.caches.caches import fill_caches, open_caches, open_memo
from sushi_research.data.training_data import captions_of, prompts_of, read_data
from sushi_research.models import loading
from sushi_research.models.loading import find_base
from sushi_research.progress import Phases, progress
from sushi_research.runs import tracking
from sushi_research.runs.run_folder import RunFolder
from sushi_research.sampling import sample_grids
from sushi_research.training import evaluating, optim, resume
from sushi_research.training import run as training
from sushi_research.training.loader import Batch, Loader
from sushi_research.training.plan import make_plan
from sushi_research.training.precision import COMPUTE_DTYPES, Masters, make_scaler
from sushi_research.training.sampler import Sampler
from sushi_research.training.step_metrics import Tally
from sushi_research.training.stopping import StopRequest

# --- end shared ---
from sushi_research.models import sd15 as model  # isort: skip


def training_step(
    config: SD15Training,
    unet: torch.nn.Module,
    batch: Batch,
    step: int,
    group: int,
    abar: torch.Tensor,
    prediction_type: str,
    scaler: torch.amp.GradScaler,
    tally: Tally,
) -> None:
    """One micro-batch of B samples: draw, noise, predict, compare, weigh, and add to the gradients of the step."""
    if config.lora.dropout:  # the one thing that torch draws itself
        torch.manual_seed(randomness.torch_seed(config.train.seed, "dropout", step, *batch.keys[0]))
    timesteps = batch.integers("timestep", diffusion.NUM_TIMESTEPS)  # [B]
    noise = batch.normal("noise")  # [B, 4, H/8, W/8] fp32
    if config.loss.noise_offset:
        offset = batch.normal("noise_offset", (noise.shape[1],))
        noise = diffusion.offset_noise(noise, offset, config.loss.noise_offset)
    latents = diffusion.posterior_sample(batch.mean, batch.std, batch.normal("posterior"), model.SCALING_FACTOR)
    noisy = diffusion.add_noise(latents, noise, timesteps, abar)
    prediction = model.predict(unet, noisy, timesteps, batch.text)
    # The target is what the base predicts: the noise, or v.
    target = diffusion.target(latents, noise, timesteps, abar, prediction_type)
    losses = diffusion.mse_per_sample(prediction, target)  # [B] fp32
    weights = diffusion.min_snr_weight(timesteps, abar, config.loss.snr_gamma, prediction_type)
    loss = (losses * weights).sum() / group  # this micro-batch's part of the step's mean over G samples
    scaler.scale(loss).backward()
    tally.add(loss, losses, diffusion.timestep_quarter(timesteps), batch.names)


def main(config: SD15Training) -> int:
    """Runs the training that `config` describes; returns the exit status: 0, or 128 + the signal that stopped it."""
    # --- shared: main ---
    accelerator, precision = training.start(config)
    with training.open_run(config, model, precision, accelerator) as run:
        try:
            return train(config, accelerator, precision, run)
        except torch.OutOfMemoryError as error:
            raise training.out_of_memory(config, error) from error
        finally:
            tracking.end_trackers(accelerator)
    # --- end shared ---


def train(config: SD15Training, accelerator: Accelerator, precision: str, run: RunFolder | None) -> int:
    """The order of events. `run` is None for a dry run, which ends after the plan."""
    # --- shared: base, data, plan ---
    began, phases = time.time(), Phases("planning")
    device, stop = accelerator.device, StopRequest()
    group = training.samples_per_step(config, accelerator)  # G
    memo = open_memo(config)
    base = find_base(config, model)
    data = read_data(config, memo, run, accelerator)
    sampler = Sampler(tuple(item.bucket for item in data.items), group, config.train.seed)
    caches = open_caches(config, base, model, memo, accelerator)
    prompts = prompts_of(config, data.items)
    captions = captions_of(config, data, prompts)
    plan = make_plan(config, base, model, data, sampler, caches, captions, precision, accelerator)
    if config.dry_run:
        return 0
    # --- end shared ---

    # --- shared: begin or continue, fill the caches ---
    start = resume.begin(config, run, base, model, data, caches, plan, memo, precision, accelerator)
    if start.nothing_to_do:
        return 0
    phases.enter("caching")
    fill_caches(caches, data, captions, base, model, accelerator)
    # --- end shared ---

    # --- shared: the adapter on the frozen UNet ---
    # Weights and activations in the compute dtype; the adapter's masters, the sum of its gradients and the loss in fp32.
    phases.enter("loading")
    unet = loading.load_unet(base, COMPUTE_DTYPES[precision], device, config.train.attention)
    lora.attach(
        unet,
        targets=config.lora.targets,
        rank=config.lora.rank,
        alpha=config.lora.alpha,
        dropout=config.lora.dropout,
        init=config.lora.init,
        seed=config.train.seed,
    )
    unet.train()
    if config.train.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    masters = Masters(lora.adapter_parameters(unet), COMPUTE_DTYPES[precision])
    optimizer = optim.build_optimizer(
        config.optimizer.name, masters.parameters(), config.optimizer.lr, config.optimizer.kwargs
    )
    learning_rate = optim.make_schedule(
        config.schedule.name,
        lr=config.optimizer.lr,
        total_steps=plan["steps"],
        warmup=config.schedule.warmup,
        cycles=config.schedule.cycles,
        power=config.schedule.power,
    )
    scaler = make_scaler(precision, device)
    training.restore(start, masters, optimizer, scaler)
    # --- end shared ---

    loader = Loader(
        data.items,
        sampler,
        caches,
        batch_size=config.train.batch_size,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        device=device,
        flip=config.data.flip,
        ahead=("posterior", "noise"),
    )

    # --- shared: the loop ---
    metrics = training.open_trackers(config, run, start, accelerator)
    abar = diffusion.alphas_cumprod(zero_terminal_snr=base.prediction.zero_terminal_snr).to(device)
    step, stopping = start.step, False
    judge = evaluating.prepare(config, run, start, base, model, data, caches, unet, precision, accelerator)
    if judge:
        phases.enter("evaluating")
        evaluating.assess(judge, unet, step, plan["steps"], metrics, accelerator)
    phases.enter("drawing")
    if step == 0 or (config.sample.every and step % config.sample.every == 0):
        sample_grids.draw(config, run, base, model, caches, prompts, unet, step, accelerator)
    phases.enter("training")
    bar = progress(
        total=plan["steps"],
        initial=step,
        description="training",
        unit="step",
        disable=not accelerator.is_main_process,
    )
    with stop, contextlib.closing(loader), bar:
        while step < plan["steps"] and not stopping:
            tally = Tally(device, accelerator.num_processes)
            for batch in loader.step(step):
                training_step(config, unet, batch, step, group, abar, base.prediction.type, scaler, tally)
                masters.accumulate()
            stopping = tally.reduce(masters, accelerator, stop=stop.poll(), waited=loader.take_waited())
            tally.require_finite(step + 1)
            rate = optim.set_learning_rate(optimizer, learning_rate(step))
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(masters.parameters(), config.train.max_grad_norm or float("inf"))
            scaler.step(optimizer)
            scaler.update()
            masters.refresh()
            masters.zero_grad()
            step += 1

            # Once in a while: log, save, evaluate, draw.
            values = tally.values(step, rate, norm.item(), plan)
            tracking.log(accelerator, metrics, values, step)
            bar.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)
            bar.update()
            last = step == plan["steps"]
            if last or stopping or (config.checkpoint.every and step % config.checkpoint.every == 0):
                phases.enter("saving")
                training.save(config, run, start, step, masters, optimizer, scaler, plan, accelerator)
            if judge and (last or not stopping):
                phases.enter("evaluating")
                evaluating.assess(judge, unet, step, plan["steps"], metrics, accelerator)
            if not last and not stopping and config.sample.every and step % config.sample.every == 0:
                phases.enter("drawing")
                sample_grids.draw(config, run, base, model, caches, prompts, unet, step, accelerator)
            phases.enter("training")
    # --- end shared ---

    # --- shared: finish ---
    if step < plan["steps"]:
        accelerator.print(f"stopped at step {step} of {plan['steps']}; the same command again continues from here")
        return stop.exit_status
    phases.enter("saving")
    training.write_adapter(config, run, start, base, model, masters, unet, plan, began, accelerator)
    phases.enter("drawing")
    sample_grids.draw(config, run, base, model, caches, prompts, unet, step, accelerator)
    training.finish(config, run, metrics, step, phases, accelerator)
    # --- end shared ---
    return 0


if __name__ == "__main__":
    run_main(main, CONFIG)
