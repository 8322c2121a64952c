"""Logs metrics to metrics.jsonl, which is the record, and to W&B and TensorBoard, which display it.

All use the same keys, by optimizer step. W&B's own step starts at 0 again when a run is continued, so `step` is logged
as a value and used as the x axis of every chart; a continued run then continues its curves. In TensorBoard `step` is
the axis already, and entries that an earlier process logged past the checkpoint are purged.

Tracker failures do not stop a training run: a failing tracker is reported and dropped, and metrics.jsonl continues. Only a
failure to write metrics.jsonl is an error. The functions do nothing outside the main process.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sushi_research.errors import UserError
from sushi_research.files import require_same_folder
from sushi_research.runs.metrics_file import MetricsFile, Values

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)


class Trackers(NamedTuple):
    """The trackers of a run (accelerate's names), the mode of W&B, and a notice for the terminal."""

    names: list[str]
    wandb_mode: str | None  # online, offline, or None without W&B
    may_fall_back: bool  # from online to offline, if W&B cannot be reached and online was not requested
    notice: str


def resolve_trackers(wandb_setting: str, tensorboard: bool) -> Trackers:
    """Resolves `tracking.wandb` (auto, online, offline or off) and `tracking.tensorboard` on this machine.

    `auto` follows WANDB_MODE (or W&B's settings file) if that is offline or disabled. Otherwise it is online if W&B
    finds credentials (WANDB_API_KEY, netrc, settings), else offline. Never prompts, and does not use the network without
    credentials. Raises UserError if `online` is not possible.
    """
    mode, notice = _wandb_mode(wandb_setting)
    names = (["wandb"] if mode else []) + (["tensorboard"] if tensorboard else [])
    return Trackers(names, mode, wandb_setting == "auto", notice)


def _wandb_mode(setting: str) -> tuple[str | None, str]:
    if setting == "off":
        return None, "W&B: off"
    if setting == "offline":
        return "offline", "W&B: offline"
    import wandb

    configured = wandb.setup().settings.mode
    if configured in ("offline", "dryrun", "disabled"):
        if setting == "online":
            raise UserError(f"tracking.wandb is online but WANDB_MODE is {configured}: change one of them")
        return (None, "W&B: off (WANDB_MODE)") if configured == "disabled" else ("offline", "W&B: offline (WANDB_MODE)")
    try:
        problem = None if wandb.login(prompt=False, verify=False) else "not logged in"
    except wandb.errors.AuthenticationError as error:
        problem = f"the credentials cannot be used: {error}"
    if problem is None:
        return "online", "W&B: online"
    if setting == "online":
        raise UserError(f"tracking.wandb is online but W&B is not ({problem}): run `wandb login`, or set it to offline")
    return "offline", f"W&B: offline ({problem}; `wandb login` once, and later runs are online)"


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
        import wandb

        assert trackers.wandb_mode is not None
        options = {"id": run_id, "name": name, "config": config, "entity": entity, "tags": list(tags), "dir": folder}
        try:
            tracker = _start_wandb(project, trackers.wandb_mode, options)
        except wandb.errors.Error as error:
            if not trackers.may_fall_back:
                raise UserError(
                    f"W&B cannot be reached ({error}): try again, or set tracking.wandb to offline"
                ) from error
            logger.warning("W&B cannot be reached (%s): going on offline", error)
            tracker = _start_wandb(project, "offline", options)
        accelerator.trackers.append(tracker)
    if "tensorboard" in trackers.names:
        from accelerate.tracking import TensorBoardTracker

        tensorboard = TensorBoardTracker("tensorboard", folder, purge_step=step + 1)
        tensorboard.start()
        # As text, because accelerate's hyperparameter record takes only flat values and adds a run at each launch.
        tensorboard.writer.add_text("config", f"```\n{json.dumps(config, indent=2)}\n```", global_step=0)
        accelerator.trackers.append(tensorboard)


def _start_wandb(project: str, mode: str, options: dict[str, Any]) -> Any:
    import wandb
    from accelerate.tracking import WandBTracker

    # Do not upload code or a diff of the user's working tree, which may be private; provenance.json has the commit.
    # Silent if offline: our notice says the same, and W&B's hint about `wandb online` would be misleading.
    settings = wandb.Settings(save_code=False, disable_code=True, silent=mode == "offline")
    tracker = WandBTracker(project, mode=mode, resume="allow", settings=settings, **options)
    tracker.start()
    tracker.run.define_metric("step")
    tracker.run.define_metric("*", step_metric="step")
    return tracker


def log(accelerator: Accelerator, metrics: MetricsFile, values: Values, step: int) -> None:
    """Logs `values` of one optimizer step to metrics.jsonl and every tracker, under the same keys.

    None means "no value": null in metrics.jsonl, omitted elsewhere. Raises the errors of `MetricsFile.append`.
    """
    if not accelerator.is_main_process:
        return
    assert "step" not in values
    metrics.append({"step": step, **values})
    numbers = {key: value for key, value in values.items() if value is not None}

    def send(tracker: Any) -> None:
        if tracker.name == "wandb":
            tracker.log({"step": step, **numbers})
        else:
            tracker.log(numbers, step=step)

    _each_tracker(accelerator, send)


def log_images(accelerator: Accelerator, key: str, paths: Sequence[Path], captions: Sequence[str], step: int) -> None:
    """Logs image files of one optimizer step, each with its caption, to every tracker."""

    def send(tracker: Any) -> None:
        if tracker.name == "wandb":
            import wandb

            images = [wandb.Image(str(path), caption=text) for path, text in zip(paths, captions, strict=True)]
            tracker.log({"step": step, key: images})
        else:
            import numpy as np
            from PIL import Image

            for number, (path, text) in enumerate(zip(paths, captions, strict=True)):
                with Image.open(path) as image:
                    pixels = np.asarray(image.convert("RGB"))
                tracker.writer.add_image(f"{key}/{number}", pixels, step, dataformats="HWC")
                tracker.writer.add_text(f"{key}/{number}", text, step)

    if accelerator.is_main_process:
        _each_tracker(accelerator, send)


def log_artifact(accelerator: Accelerator, kind: str, paths: Sequence[Path], root: Path | None = None) -> None:
    """Stores files in W&B as a new version of the artifact `<kind>-<run id>`. TensorBoard has no artifacts.

    Files are named by their path relative to `root`, or without `root` by their file name.
    """

    def send(tracker: Any) -> None:
        if tracker.name == "wandb":
            import wandb

            artifact = wandb.Artifact(f"{kind}-{tracker.run.id}", type=kind)
            for path in paths:
                # Upload the file in place: by default W&B keeps copies in the user's home folder.
                name = path.name if root is None else path.relative_to(root).as_posix()
                artifact.add_file(str(path), name=name, policy="immutable", skip_cache=True)
            tracker.run.log_artifact(artifact)

    if accelerator.is_main_process:
        _each_tracker(accelerator, send)


def end_trackers(accelerator: Accelerator) -> None:
    """Finishes every tracker; W&B uploads what remains. Call it last. Failures are logged, not raised."""
    _each_tracker(accelerator, lambda tracker: tracker.finish())
    accelerator.trackers.clear()


def _each_tracker(accelerator: Accelerator, send: Callable[[Any], None]) -> None:
    for tracker in list(accelerator.trackers):
        try:
            send(tracker)
        except Exception as error:  # a failing tracker must not stop the training
            logger.warning("%s failed and is skipped from here on (metrics.jsonl goes on): %s", tracker.name, error)
            accelerator.trackers.remove(tracker)
