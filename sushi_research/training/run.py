"""What every training script does around its training step: start, run folder, trackers, adapter file, finish.

The scripts call these functions in order. `resume.py` starts or resumes a run.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import ModuleType

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from sushi_research import stopping
from sushi_research.config import TrainingConfig
from sushi_research.config.command_line import config_to_dict
from sushi_research.config.sets import sets_of
from sushi_research.errors import NotFinite, UserError
from sushi_research.files import write_json
from sushi_research.imports import importing
from sushi_research.precision import resolve_precision
from sushi_research.runs import launch, provenance, run_folder, tracking
from sushi_research.runs.code import code_of
from sushi_research.runs.dry_run import DryRun
from sushi_research.runs.job import Job, agree
from sushi_research.runs.metrics_file import MetricsFile
from sushi_research.terminal import say
from sushi_research.training import best_files, hub_upload, page_output, run_end, starting_point
from sushi_research.training.kept import what_is_kept
from sushi_research.training.measured_rate import note_rate
from sushi_research.training.optimizer_classes import class_path
from sushi_research.training.resume import RunState
from sushi_research.training.run_plan import Plan
from sushi_research.training.state import TrainState

logger = logging.getLogger(__name__)


def start_job(config: TrainingConfig, model: ModuleType, script: str, *, trains: bool = True) -> Job:
    """The job of a command: its processes, and the precision that follows from config, launcher and device. No run folder yet.

    Of a command that trains, lora.start_from is read, and its rank, alpha and targets become those of the config.
    `script` is the `__file__` of the running script. Its code is hashed here, before a user may edit it while the run goes on.
    The Accelerator's own mixed precision stays off: the script handles dtypes and the loss scaler (rule 6, CONTRIBUTING.md).
    """
    launch.require_launch(os.environ)
    quiet_libraries()
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION")
    # Without cpu=True two processes on a machine without a GPU would not form a process group. The default timeout of ten
    # minutes is shorter than one process may take to decode, download, encode or generate.
    timeout = InitProcessGroupKwargs(timeout=timedelta(hours=12))
    with launch.joining():
        accelerator = Accelerator(mixed_precision="no", cpu=not torch.cuda.is_available(), kwargs_handlers=[timeout])
    # Full fp32: by default cuDNN's convolutions, including the VAE's, round their inputs to 10 mantissa bits (TF32).
    torch.backends.cudnn.allow_tf32 = False
    if not accelerator.is_main_process:
        logging.getLogger().setLevel(logging.ERROR)  # the main process reports what all processes see
    precision = resolve_precision(config.train.precision, launcher, accelerator.device)
    if config.train.deterministic:
        # cuBLAS reads this at its first use. Without it, torch refuses to run cuBLAS deterministically.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(config.train.deterministic)
    # By default torch then fills new memory, so that code which reads it before writing it does the same each time. The step
    # has no such code: on an H200 it was bit for bit the same without, and the fills took 6 % of its time (docs/performance.md).
    torch.utils.deterministic.fill_uninitialized_memory = not config.train.deterministic
    optimizer = class_path(config.optimizer.name)
    code = code_of(script, [optimizer]) if accelerator.is_main_process else {}
    start = None
    if trains and config.lora.start_from is not None:
        config, start = starting_point.read(config, model)
        if accelerator.is_main_process:
            say(start.describe())
    return Job(config, model, accelerator, precision.name, precision_reason=precision.reason, code=code, start=start)


def quiet_libraries() -> None:
    """Imports the libraries and hides their progress bars and notices. Their errors are still shown."""
    # On its import it warns that an optional kernel for 4-bit inference on a CPU is not installed.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with importing("diffusers"):
        import diffusers.models.unets.unet_2d_condition
        import diffusers.utils.logging
        import transformers.utils.logging

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.disable_progress_bar()
        library.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(diffusers|transformers|huggingface_hub)\.")


@contextlib.contextmanager
def open_run(job: Job) -> Iterator[Job]:
    """The job with its run folder, which the main process locks. A dry run has none, but a folder in it for its plan.

    Raises UserError if the run folder cannot be opened, or is that of the data, whose images would be mixed with the run's.
    """
    config = job.config
    agree(_shares_folder(config))
    if config.dry_run:
        with stopping.doing("planning", lambda: what_is_kept(job)):
            yield replace(job, dry_run=DryRun(job.run_path))
        return
    with contextlib.ExitStack() as stack:
        error = None
        try:
            run = run_folder.open_run_folder(job.run_path.parent, job.run_path.name, writer=job.is_main)
            stack.enter_context(run)
        except UserError as found:
            error = found
        agree(error)
        try:
            opened = replace(job, run=run)
            with stopping.doing(lambda: job.timings.current, lambda: what_is_kept(opened)), noted(opened):
                yield opened
        finally:
            run.remove_if_empty()


@contextlib.contextmanager
def noted(job: Job) -> Iterator[None]:
    """A block that notes in the run folder of a range test whether a loss or gradient that is not finite ended it, and at no other
    error. To find_learning_rate.py the first is the end of its curve."""
    if job.run is None or not job.is_main or job.config.schedule.name != "range_test":
        yield
        return
    job.run.not_finite.unlink(missing_ok=True)  # of an earlier command
    try:
        yield
    except NotFinite as error:
        with contextlib.suppress(UserError, OSError):  # the loss is what to report
            write_json(job.run.not_finite, {"reason": str(error)})
        raise


def _shares_folder(config: TrainingConfig) -> UserError | None:
    """An error if the run's folder is that of the images."""
    evaluation = config.evaluation
    paths = {each.key("path"): each.path for each in sets_of(config)} | {"evaluation.path": evaluation.path}
    for key, path in (paths | {"evaluation.prior_path": evaluation.prior_path}).items():
        if not config.run.name or not path:
            continue
        if os.path.isdir(path) and os.path.realpath(path) == os.path.realpath(Path(config.run.folder, config.run.name)):
            return UserError(
                f"run.folder and run.name give the folder of {key}, {path}: give the run a folder of its own."
            )
    return None


def out_of_memory(config: TrainingConfig, error: Exception) -> UserError:
    """An out-of-memory error with advice: which settings to lower, in which order.

    `config` is the command's own: with train.memory, it does not have what that chose.
    """
    train, advice = config.train, []
    if train.memory is not None:
        advice.append(f"a train.memory below {train.memory} (what is predicted was too low here)")
    else:
        advice.append("--train.memory 8GB (or what is free: it chooses the settings named next so that they fit)")
    if train.memory is None and train.gradient_checkpointing != "all":
        advice.append("--train.gradient_checkpointing all (far less memory, a third more compute)")
    samples_per_process, batch_size = train.batch_size * train.accumulation, train.batch_size
    if train.memory is None and batch_size > 1:
        # At most half, and a divisor, so that the global batch size does not change.
        smaller = max(size for size in range(1, batch_size // 2 + 1) if samples_per_process % size == 0)
        advice.append(
            f"--train.batch_size {smaller} --train.accumulation {samples_per_process // smaller} (the same training with smaller "
            f"micro-batches)"
        )
    if config.optimizer.name not in ("adamw8bit", "adafactor", "lion8bit"):  # whose state is not larger
        advice.append("--optimizer.name adamw8bit")
    if config.model.base_storage == "compute":
        advice.append("--model.base_storage int8 (half of the base's memory, in a new run: docs/small_base.md)")
    if config.lora.rank > 1:
        advice.append(f"--lora.rank {config.lora.rank // 2}")
    resolution = config.data.resolution * 3 // 4 // config.data.bucket_step * config.data.bucket_step
    if config.data.resolutions or any(each.resolutions for each in config.data.sets):
        advice.append("lower resolutions of the images (data.resolutions, and those in data.sets)")
    elif resolution > 0:
        advice.append(f"--data.resolution {resolution}")
    steps = "; then ".join(["close other programs that use the device", *advice])
    return UserError(f"out of memory ({str(error).splitlines()[0]}): {steps}.")


def open_trackers(job: Job, run_state: RunState) -> MetricsFile:
    """Starts W&B and TensorBoard as configured. Returns the metrics file."""
    config, run = job.config, job.run
    assert run is not None
    metrics_file = MetricsFile(run.metrics)
    with job.main_process_writes():
        if job.is_main:
            trackers = tracking.resolve_trackers(config.tracking.wandb, config.tracking.tensorboard)
            say(trackers.notice)
            record = run.record()
            tracking.start_trackers(
                job.accelerator,
                trackers,
                folder=run.path,
                # Under a sweep, W&B accepts only the run id of the sweep agent.
                run_id=run_folder.sweep_run_id() or record["wandb_id"],
                name=run.name,
                config=config_to_dict(config) | {"provenance": provenance.facts(run_state.provenance)},
                project=config.tracking.project,
                entity=config.tracking.entity,
                tags=config.tracking.tags,
                step=run_state.step,
            )
            tracking.log_artifact(job.accelerator, "plan", [run.config, run.plan])
            # Caching may have taken hours since the file was cut back.
            if lost := metrics_file.mark_missing(run_state.step):
                logger.warning(lost)
    return metrics_file


def finish(job: Job, state: TrainState, metrics_file: MetricsFile, step: int) -> None:
    """Writes the page and the curves, sends both to the trackers, marks the run as finished, and prints what was written.

    Warns if the adapter file does not change the base, which happens if the steps were too small or too few.
    """
    if not job.is_main:
        return
    job.timings.enter("saving")
    config, run, accelerator = job.config, job.run, job.accelerator
    page_output.write_last(job, step, f"finished at step {step}")
    # Without keep_best, a file of an earlier launch may no longer be that of the best step.
    best = list(run.best_adapters().values()) if config.evaluation.keep_best else []
    tracking.log_artifact(accelerator, "adapter", [run.adapter, *best, run.config, run.provenance])
    run.mark_finished(step)
    note_rate(job)
    # Everything that scripts/compare_runs.py reads, so that it can compare runs from several machines.
    tracking.log_artifact(accelerator, "record", run.record_files(), root=run.path)
    run_end.tell(job, state, job.timings.seconds(), step)
    hub_upload.push_finished(job)


def stopped(job: Job, plan: Plan, step: int) -> None:
    """Writes the page and the curves of a run that was stopped with a checkpoint of `step`, and prints how it goes on."""
    if not job.is_main:
        return
    assert job.run is not None
    if job.config.evaluation.keep_best:
        best_files.remove_superseded(job.run)
    page_output.write_last(job, step, f"stopped at step {step} of {plan.steps}")
    note_rate(job)
    job.say(
        f"stopped at step {step} of {plan.steps}; the same command again continues from here",
        _file_of(job, step, plan.steps),
    )


def _file_of(job: Job, step: int, steps: int) -> str:
    """A line about the adapter file of the step at which the run stopped."""
    run = job.run
    assert run is not None
    path = run.adapter if step == steps else run.step_adapter(step)
    if path.is_file():
        return f"its adapter file is {path}"
    why = "checkpoint.keep_adapters is 0" if job.config.checkpoint.keep_adapters == 0 else "it could not be written"
    return f"it has no adapter file ({why}): the same command with --train.steps {step} writes one"
