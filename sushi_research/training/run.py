"""What every training script does around its step: start, the run folder, saving, trackers, finishing.

The order of events is the script's; each function here is one of them. `beginning.py` has how a run begins or continues.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from sushi_research.adapters import kohya_format, lora
from sushi_research.caches.store import entry_key
from sushi_research.config import TrainingConfig
from sushi_research.config.command_line import config_to_dict
from sushi_research.errors import UserError
from sushi_research.files import write_json
from sushi_research.models import loading
from sushi_research.progress import Phases
from sushi_research.runs import identity, provenance, run_folder, tracking
from sushi_research.runs.checkpoint import save_checkpoint
from sushi_research.runs.run_folder import RunFolder
from sushi_research.sampling import plots
from sushi_research.training.precision import Masters, resolve_precision
from sushi_research.training.resume import Start, agree


def start(config: TrainingConfig) -> tuple[Accelerator, str]:
    """The Accelerator, and the precision ("bf16", "fp16" or "fp32") that config, launcher and device come to.

    The Accelerator's own mixed precision stays off: design rule 6, the script owns dtypes and the loss scaler.
    """
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    quiet_libraries()
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION")
    # cpu=True: without it two processes on a machine without a GPU do not see each other. The time that processes wait for
    # each other is ten minutes otherwise: less than one of them may decode, download, encode or draw.
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=12))
    accelerator = Accelerator(mixed_precision="no", cpu=not torch.cuda.is_available(), kwargs_handlers=[patience])
    # fp32 means fp32: cuDNN's convolutions would round their inputs to 10 bits (TF32), those of the VAE too.
    torch.backends.cudnn.allow_tf32 = False
    if not accelerator.is_main_process:
        logging.getLogger().setLevel(logging.ERROR)  # what all processes see, the main process says
    precision = resolve_precision(config.train.precision, launcher, accelerator.device)
    if config.train.deterministic:
        # cuBLAS reads this when it is first used; without it the deterministic algorithms are refused.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(config.train.deterministic)
    return accelerator, precision


def quiet_libraries() -> None:
    """Keeps the libraries' own bars and notes off the terminal; their errors still come through."""
    import diffusers.utils.logging
    import transformers.utils.logging

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.disable_progress_bar()
        library.set_verbosity_error()
    # It announces at WARNING that an optional kernel for 4-bit inference on a CPU is not installed.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(diffusers|transformers|huggingface_hub)\.")


@contextlib.contextmanager
def open_run(
    config: TrainingConfig, model: ModuleType, precision: str, accelerator: Accelerator
) -> Iterator[RunFolder | None]:
    """The run folder of the config, locked by the main process; None for a dry run, which writes nothing there."""
    if config.dry_run:
        yield None
        return
    group = samples_per_step(config, accelerator)
    settings = identity.run_identity(config_to_dict(config), {"samples_per_step": group, "precision": precision})
    name = config.run.name or identity.default_name(model.NAME, config.data.path, settings)
    with contextlib.ExitStack() as stack:
        error = None
        try:
            run = run_folder.open_run(Path(config.run.folder), name, writer=accelerator.is_main_process)
            stack.enter_context(run)
        except UserError as found:
            error = found
        agree(error, accelerator)
        try:
            yield run
        finally:
            if accelerator.is_main_process and [path.name for path in run.path.iterdir()] == [".lock"]:
                shutil.rmtree(run.path, ignore_errors=True)  # refused before anything was written: no run was begun


def samples_per_step(config: TrainingConfig, accelerator: Accelerator) -> int:
    """G of design rule 7: what one optimizer step sees, over all processes."""
    return config.train.batch_size * config.train.accumulation * accelerator.num_processes


def restore(start: Start, masters: Masters, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
    """Sets the adapter's masters, the optimizer and the loss scaler to the checkpoint, if there is one."""
    if start.checkpoint is None:
        return
    state = start.checkpoint.load()
    masters.load(state["adapter"])
    optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])


def save(
    config: TrainingConfig,
    run: RunFolder,
    start: Start,
    step: int,
    masters: Masters,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    plan: Mapping[str, Any],
    accelerator: Accelerator,
) -> None:
    """Saves a checkpoint of `step`: all that the steps after it depend on. The main process writes, the others wait."""
    if accelerator.is_main_process:
        tracking.MetricsFile(run.metrics).sync()
        state = {
            "adapter": masters.named_state(),
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
        }
        facts = {
            "samples_seen": step * plan["samples_per_step"],
            "epoch": step * plan["samples_per_step"] / plan["items_per_epoch"],
            "world": accelerator.num_processes,
            "identity": start.identity,
        }
        save_checkpoint(run.checkpoints, step, state, facts, config.checkpoint.keep)
    accelerator.wait_for_everyone()


def out_of_memory(config: TrainingConfig, error: Exception) -> UserError:
    """What to lower, and in which order, after an out-of-memory error."""
    advice = []
    if not config.train.gradient_checkpointing:
        advice.append("--train.gradient_checkpointing true (far less memory for a third more work)")
    group, batch_size = config.train.batch_size * config.train.accumulation, config.train.batch_size
    if batch_size > 1:
        # At most half, and so that the samples of a step stay as they are.
        smaller = max(size for size in range(1, batch_size // 2 + 1) if group % size == 0)
        advice.append(
            f"--train.batch_size {smaller} --train.accumulation {group // smaller} (the same training, in smaller pieces)"
        )
    if config.optimizer.name != "adamw8bit":
        advice.append("--optimizer.name adamw8bit")
    if config.lora.rank > 1:
        advice.append(f"--lora.rank {config.lora.rank // 2}")
    resolution = config.data.resolution * 3 // 4 // config.data.bucket_step * config.data.bucket_step
    if resolution > 0:
        advice.append(f"--data.resolution {resolution}")
    steps = "; then ".join(["close other programs that use the device", *advice])
    return UserError(f"out of memory ({str(error).splitlines()[0]}): {steps}.")


def open_trackers(
    config: TrainingConfig, run: RunFolder, start: Start, accelerator: Accelerator
) -> tracking.MetricsFile:
    """Starts W&B and TensorBoard as the config says, and returns the metrics file."""
    if accelerator.is_main_process:
        trackers = tracking.resolve_trackers(config.tracking.wandb, config.tracking.tensorboard)
        print(trackers.notice, flush=True)
        record = run.record()
        tracking.start_trackers(
            accelerator,
            trackers,
            folder=run.path,
            # Another agent's run has another id; W&B takes no other under a sweep.
            run_id=run_folder.sweep_run_id() or record["wandb_id"],
            name=run.name,
            config=config_to_dict(config) | {"provenance": provenance.facts(start.provenance)},
            project=config.tracking.project,
            entity=config.tracking.entity,
            tags=config.tracking.tags,
            step=start.step,
        )
        tracking.log_artifact(accelerator, "plan", [run.config, run.plan])
    return tracking.MetricsFile(run.metrics)


def write_adapter(
    config: TrainingConfig,
    run: RunFolder,
    start: Start,
    base: loading.Base,
    model: ModuleType,
    masters: Masters,
    unet: torch.nn.Module,
    plan: Mapping[str, Any],
    began: float,
    accelerator: Accelerator,
) -> None:
    """Writes adapter.safetensors, and reads it back as diffusers does: a file that differs from what was trained is an error."""
    if accelerator.is_main_process:
        metadata = kohya_format.adapter_metadata(
            architecture=model.NAME,
            name=run.name,
            targets=lora.resolve_targets(config.lora.targets),
            rank=config.lora.rank,
            alpha=config.lora.alpha,
            dropout=config.lora.dropout,
            resolution=config.data.resolution,
            seed=config.train.seed,
            steps=plan["steps"],
            epochs=int(plan["epochs"]),
            learning_rate=config.optimizer.lr,
            optimizer=config.optimizer.name,
            base=_published_name(base.source),
            base_hash=start.hashes["base_model"]["unet"],
            dataset_hash=start.hashes["data"],
            config_hash=entry_key(identity=start.identity),
            images=plan["images"],
            started=began,
            finished=time.time(),
            prediction=base.prediction,
            extra={
                "ss_min_snr_gamma": config.loss.snr_gamma,
                "ss_noise_offset": config.loss.noise_offset or None,
                "ss_clip_skip": getattr(config.model, "clip_skip", None),  # where the architecture has one
            },
        )
        state, dtype = masters.named_state(), getattr(torch, config.lora.save_dtype)
        kohya_format.save_adapter(
            run.adapter, unet, architecture=model.NAME, state=state, dtype=dtype, metadata=metadata
        )
        kohya_format.verify_saved(run.adapter, unet, architecture=model.NAME, state=state, dtype=dtype)
    accelerator.wait_for_everyone()


def _published_name(source: str) -> str:
    """A hub id as it is, of a folder or file its name alone: an adapter goes out into the world, the user's folders do not."""
    path = Path(source).expanduser()
    return os.path.basename(os.path.abspath(path)) if path.exists() else source


def finish(
    config: TrainingConfig,
    run: RunFolder,
    metrics: tracking.MetricsFile,
    step: int,
    phases: Phases,
    accelerator: Accelerator,
) -> None:
    """Draws the curves, hands the results to the trackers, marks the run finished, and says what was written."""
    if not accelerator.is_main_process:
        return
    curves = run.path / "loss.png"
    plots.curves(metrics.read(), curves, run.name)
    tracking.log_images(accelerator, "curves", [curves], [run.name], step)
    tracking.log_artifact(accelerator, "adapter", [run.adapter, run.config, run.provenance])
    seconds = {name: round(value, 2) for name, value in phases.seconds().items()}
    write_json(run.phases, seconds)
    run.mark_finished(step)
    # All that scripts/compare_runs.py reads, so that it can compare runs of several machines.
    tracking.log_artifact(accelerator, "record", run.record_files(), root=run.path)
    written = {"adapter": run.adapter, "curves": curves, "metrics": run.metrics}
    if run.evaluation.exists():
        written["held-out"] = run.evaluation
    if config.sample.enabled:
        written["pictures"] = run.samples / "progress.png"
    if any((run.path / "wandb").glob("offline-run-*")):
        written["W&B"] = f"{run.path}/wandb (offline; `wandb sync {run.path}/wandb/offline-run-*` uploads it)"
    print(f"\nfinished; seconds: {', '.join(f'{name} {value:.0f}' for name, value in seconds.items())}; written:")
    for what, path in written.items():
        print(f"  {what:<9} {path}")
    print(
        "next: put the adapter into your program's LoRA folder (ComfyUI, A1111, Forge, InvokeAI; diffusers: "
        "load_lora_weights), or draw a grid with scripts/sample.py",
        flush=True,
    )
