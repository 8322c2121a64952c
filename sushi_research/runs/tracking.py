"""Logs metrics to metrics.jsonl, which is the record, and to W&B and TensorBoard, which display it.

The trackers show the same numbers by optimizer step, in sections (`shown_key`). W&B's own step starts at 0 again when a run is
continued, so `step` is logged as a value and used as the x axis of every chart; a continued run then continues its curves. In
TensorBoard `step` is the axis already, and entries that an earlier process logged past the checkpoint are purged.

Tracker failures do not stop a training run: a failing tracker is reported and dropped, and metrics.jsonl continues. Only a
failure to write metrics.jsonl is an error. The functions do nothing outside the main process.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sushi_research.errors import first_line, some
from sushi_research.files import require_same_folder
from sushi_research.runs import wandb_run
from sushi_research.runs.metrics_file import MetricsFile, Values

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

# Section of the trackers' panels -> keys of metrics.jsonl, and of pictures, that have no section there.
SECTIONS = {
    "training": ("loss", "lr", "grad_norm", "epoch", "samples_seen", "skipped_steps", "d"),
    "speed": ("images_per_second", "gpu_seconds", "cpu_seconds", "data_wait_share", "peak_memory_gib"),
    "samples": ("samples", "progress"),
    "report": ("curves", "report"),
}
_SECTION_OF = {key: section for section, keys in SECTIONS.items() for key in keys}


def shown_key(key: str) -> str:
    """The key of metrics.jsonl as W&B and TensorBoard show it: "training/loss" for "loss". They make a section of each prefix."""
    return f"{_SECTION_OF[key]}/{key}" if key in _SECTION_OF else key


class Trackers(NamedTuple):
    """The trackers of a run (accelerate's names), the mode of W&B, and a notice for the terminal."""

    names: list[str]
    wandb_mode: str | None  # online, offline, or None without W&B
    may_fall_back: bool  # from online to offline, if W&B cannot be reached and online was not requested
    notice: str


def resolve_trackers(wandb_setting: str, tensorboard: bool) -> Trackers:
    """Resolves `tracking.wandb` (`wandb_run.resolve_mode`) and `tracking.tensorboard` on this machine.

    Raises UserError if `online` is not possible.
    """
    mode, notice = wandb_run.resolve_mode(wandb_setting)
    names = (["wandb"] if mode else []) + (["tensorboard"] if tensorboard else [])
    return Trackers(names, mode, wandb_setting == "auto", notice)


def start_trackers(
    accelerator: Accelerator,
    trackers: Trackers,
    *,
    folder: Path,
    run_id: str,
    name: str,
    config: dict[str, Any],
    project: str,
    entity: str | None,
    tags: Sequence[str],
    step: int,
) -> None:
    """Starts accelerate's trackers, with their files in `folder/wandb` and `folder/tensorboard`.

    `run_id` is the permanent W&B id of the run, so that a continued run adds to it; `wandb sync` joins the parts of an
    offline run. `config` is the config as a nested dict, without anything from the environment. `step` is that of the
    checkpoint, 0 for a new run. Raises UserError if W&B must be online and cannot be reached.

    The trackers are created here, not by `Accelerator(log_with=...)`, because the run folder becomes known only after
    the Accelerator exists.
    """
    if not accelerator.is_main_process:
        return
    require_same_folder(folder)
    if "wandb" in trackers.names:
        assert trackers.wandb_mode is not None
        options = {"id": run_id, "name": name, "config": config, "entity": entity, "tags": list(tags), "dir": folder}
        run = wandb_run.start_run(trackers.wandb_mode, trackers.may_fall_back, project, options)
        accelerator.trackers += [run] if run else []
    if "tensorboard" in trackers.names:
        try:
            accelerator.trackers.append(_start_tensorboard(folder, config, step))
        except Exception as error:
            logger.warning(
                "TensorBoard cannot be started (%s): the run goes on without it, and metrics.jsonl has every number",
                first_line(error),
            )


def _start_tensorboard(folder: Path, config: dict[str, Any], step: int) -> Any:
    from accelerate.tracking import TensorBoardTracker

    tensorboard = TensorBoardTracker("tensorboard", folder, purge_step=step + 1)
    tensorboard.start()
    # As text, because accelerate's hyperparameter record takes only flat values and adds a run at each launch.
    tensorboard.writer.add_text("config", f"```\n{json.dumps(config, indent=2)}\n```", global_step=0)
    return tensorboard


def log(accelerator: Accelerator, metrics: MetricsFile, values: Values, step: int) -> None:
    """Logs `values` of one optimizer step to metrics.jsonl and, by their `shown_key`, to every tracker.

    None means "no value": null in metrics.jsonl, omitted elsewhere. NaN and infinity, which JSON does not have, become None, with
    a warning. Raises the errors of `MetricsFile.append`.
    """
    if not accelerator.is_main_process:
        return
    assert "step" not in values
    numbers = {key: value for key, value in values.items() if value is not None and math.isfinite(value)}
    if lost := [key for key, value in values.items() if value is not None and key not in numbers]:
        logger.warning("step %d: %s is not finite (NaN or infinity) and is recorded as null", step, some(lost))
    metrics.append({"step": step, **{key: numbers.get(key) for key in values}})

    shown = {shown_key(key): value for key, value in numbers.items()}

    def send(tracker: Any) -> None:
        if tracker.name == "wandb":
            tracker.log({"step": step, **shown})
        else:
            tracker.log(shown, step=step)

    _each_tracker(accelerator, send)


def log_images(accelerator: Accelerator, key: str, paths: Sequence[Path], captions: Sequence[str], step: int) -> None:
    """Logs image files of one optimizer step, each with its caption, to every tracker. W&B gets samples as a table as well."""
    shown = shown_key(key)

    def send(tracker: Any) -> None:
        if tracker.name == "wandb":
            tracker.log_images(shown, paths, captions, step, table="samples/table" if key == "samples" else None)
        else:
            import numpy as np
            from PIL import Image

            for number, (path, text) in enumerate(zip(paths, captions, strict=True)):
                with Image.open(path) as image:
                    pixels = np.asarray(image.convert("RGB"))
                tracker.writer.add_image(f"{shown}/{number}", pixels, step, dataformats="HWC")
                tracker.writer.add_text(f"{shown}/{number}", text, step)

    if accelerator.is_main_process:
        _each_tracker(accelerator, send)


def log_artifact(accelerator: Accelerator, kind: str, paths: Sequence[Path], root: Path | None = None) -> None:
    """Stores files in W&B as a new version of the artifact `<kind>-<run id>`. TensorBoard has no artifacts.

    Files are named by their path relative to `root`, or without `root` by their file name.
    """

    def send(tracker: Any) -> None:
        if tracker.name == "wandb":
            names = [path.name if root is None else path.relative_to(root).as_posix() for path in paths]
            tracker.log_artifact(kind, dict(zip(names, paths, strict=True)))

    if accelerator.is_main_process:
        _each_tracker(accelerator, send)


def log_page(accelerator: Accelerator, page: str, summary: Values, step: int) -> None:
    """Shows a self-contained page, as HTML, in W&B, with values for the run's summary. TensorBoard has neither."""

    def send(tracker: Any) -> None:
        if tracker.name == "wandb":
            tracker.log_page(shown_key("report"), page, summary, step)

    if accelerator.is_main_process:
        _each_tracker(accelerator, send)


def end_trackers(accelerator: Accelerator) -> None:
    """Finishes every tracker; W&B uploads what remains, within its limits. Call it last. Failures are logged, not raised."""
    for tracker in list(accelerator.trackers):
        try:
            tracker.finish()
        except Exception as error:
            logger.warning("%s: %s", tracker.name, first_line(error))
    accelerator.trackers.clear()


def _each_tracker(accelerator: Accelerator, send: Callable[[Any], None]) -> None:
    for tracker in list(accelerator.trackers):
        try:
            send(tracker)
        except Exception as error:  # a failing tracker must not stop the training
            accelerator.trackers.remove(tracker)
            rest = tracker.give_up() if tracker.name == "wandb" else ""
            logger.warning(
                "%s failed and is skipped from here on (metrics.jsonl goes on%s): %s",
                tracker.name,
                rest,
                first_line(error),
            )
