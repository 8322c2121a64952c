"""One run in W&B: whether it is online, how it starts, what it is sent, and how it ends.

A network that fails costs a run seconds, not minutes, and never its adapter: each wait on W&B here has a limit.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sushi_research.config.suggestions import word
from sushi_research.errors import UserError

logger = logging.getLogger(__name__)

# W&B's own limits are 90 s for the start, and none for the end. It answers in one to three seconds. The setting's own
# environment variable, WANDB_INIT_TIMEOUT or WANDB_FINISH_TIMEOUT, takes precedence.
LIMITS = {"init_timeout": 8.0, "finish_timeout": 20.0}
# The slowest upload that is waited for at the end, in bytes per second: 2 Mbit/s.
SLOWEST_UPLOAD = 250_000

# The metrics whose minimum is in a run's summary too. Such a summary is not a number but has two, so a sweep's metric is not among
# them: W&B's sweeps read a number (configs/sweeps).
WITH_MINIMUM = ("training/loss", *(f"loss_by_timestep/{timestep_bin}" for timestep_bin in range(4)), "evaluation/loss")


def resolve_mode(setting: str) -> tuple[str | None, str]:
    """(online, offline or None without W&B, a notice for the terminal) for `tracking.wandb`: auto, online, offline or off.

    `auto` follows WANDB_MODE (or W&B's settings file) if that is offline or disabled, and WANDB_DISABLED, which transformers
    reads. Otherwise it is online if W&B finds credentials (WANDB_API_KEY, netrc, settings), else offline. Never prompts. Raises
    UserError if `online` is not possible.
    """
    if setting == "off":
        return None, "W&B: off"
    if setting == "offline":
        return "offline", "W&B: offline"
    try:
        import wandb

        source, configured = _configured(wandb.setup().settings.mode)
        if configured in ("offline", "dryrun", "disabled"):
            if setting == "online":
                raise UserError(f"tracking.wandb is online but {source} is {configured}: change one of them")
            return (
                (None, f"W&B: off ({source})") if configured == "disabled" else ("offline", f"W&B: offline ({source})")
            )
        problem = None if wandb.login(prompt=False, verify=False) else "not logged in"
    except UserError:
        raise
    except Exception as error:  # of W&B, of pydantic for its settings, or of the system
        if not _is_refused_key(error):
            if setting == "online":
                raise UserError(
                    f"tracking.wandb is online but W&B cannot be used ({reason(error)}): correct that"
                ) from error
            return None, f"W&B: off, because it cannot be used ({reason(error)})"
        problem = f"the credentials cannot be used: {reason(error)}"
    if problem is None:
        return "online", "W&B: online"
    if setting == "online":
        raise UserError(f"tracking.wandb is online but W&B is not ({problem}): run `wandb login`, or set it to offline")
    return "offline", f"W&B: offline ({problem}; `wandb login` once, and later runs are online)"


def _configured(mode: str) -> tuple[str, str]:
    """(name of the variable, mode) that the environment asks for."""
    if os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes", "on"):
        return "WANDB_DISABLED", "disabled"
    return "WANDB_MODE", mode


def _is_refused_key(error: Exception) -> bool:
    import wandb

    return isinstance(error, wandb.errors.AuthenticationError)


def reason(error: BaseException) -> str:
    """An error of W&B as one line of at most 300 letters; of its settings, the first that is wrong."""
    if isinstance(error, ValidationError):
        [first, *_] = error.errors(include_url=False)
        return f"{'.'.join(map(str, first['loc']))} is {first['input']!r}: {first['msg']}"
    return " ".join(str(error).split())[:300] or type(error).__name__


def start_run(mode: str, may_fall_back: bool, project: str, options: Mapping[str, Any]) -> WandbRun | None:
    """Starts the run: `options` are those of `wandb.init`.

    If it cannot be online, it is offline. If W&B cannot be started at all, returns None. Both are logged. UserError if it cannot
    be online and may not fall back.
    """
    if mode == "online":
        try:
            return WandbRun(project, mode, options)
        except Exception as error:  # of W&B, its service, or the system
            stop_service()  # which goes on with the first start, and refuses a second one of the same id
            if not may_fall_back:
                raise UserError(
                    f"tracking.wandb is online but W&B cannot be started ({reason(error)}): try again, or set it to offline"
                ) from error
            logger.warning(
                "W&B cannot be reached (%s): the run goes on offline, and `wandb sync` uploads it later", reason(error)
            )
    try:
        return WandbRun(project, "offline", options)
    except Exception as error:
        logger.warning(
            "W&B cannot be started (%s): the run goes on without it, and metrics.jsonl has every number", reason(error)
        )
        stop_service()
        return None


def stop_service() -> None:
    """Ends W&B's service process. Otherwise W&B does so at the end of Python, with a traceback if the service has crashed."""
    import wandb

    with contextlib.suppress(Exception):
        wandb.teardown()


def _of_one_size(paths: Sequence[Path]) -> list[Any]:
    """The image files as W&B takes them. It shows those of one key in the size of the first, so smaller ones get a white margin."""
    from PIL import Image

    images = []
    for path in paths:
        with Image.open(path) as image:
            images.append(image.convert("RGB"))
    if len({image.size for image in images}) < 2:
        return [str(path) for path in paths]
    size = max(image.width for image in images), max(image.height for image in images)
    found = []
    for image in images:
        found.append(Image.new("RGB", size, "white"))
        found[-1].paste(image, ((size[0] - image.width) // 2, (size[1] - image.height) // 2))
    return found


class WandbRun:
    """A run in W&B, online or offline. It can be in the list of accelerate's trackers."""

    name = "wandb"

    def __init__(self, project: str, mode: str, options: Mapping[str, Any]) -> None:
        import wandb

        # Older versions of W&B have no limit for the end.
        limits = {
            name: value
            for name, value in {**LIMITS, "finish_timeout_raises": True}.items()
            if name in wandb.Settings.model_fields and f"WANDB_{name.upper()}" not in os.environ
        }
        # Do not upload code or a diff of the user's working tree, which may be private; provenance.json has the commit.
        # Quiet, because otherwise it asks the server for the user's name, twice, and waits ten seconds for the answer. Silent if
        # offline: our notice says the same, and W&B's hint about `wandb online` would be misleading.
        settings = wandb.Settings(
            save_code=False,
            disable_code=True,
            quiet=True,
            silent=mode == "offline",
            **limits,
        )
        self.run = wandb.init(project=project, mode=mode, resume="allow", settings=settings, **options)
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")
        for name in WITH_MINIMUM:
            self.run.define_metric(name, step_metric="step", summary="min,last")
        self._mode = mode
        self._uploads: list[tuple[Any, int]] = []

    def log(self, values: Mapping[str, Any]) -> None:
        """Logs values, `step` among them."""
        self.run.log(dict(values))

    def log_images(
        self, key: str, paths: Sequence[Path], captions: Sequence[str], step: int, table: str | None = None
    ) -> None:
        """Logs image files, each with its caption, and as the table `table` of steps, captions and images if it is given."""
        import wandb

        pairs = list(zip(paths, captions, strict=True))
        pictures = _of_one_size(paths)
        self.log(
            {
                "step": step,
                key: [wandb.Image(each, caption=text) for each, text in zip(pictures, captions, strict=True)],
            }
        )
        if table is None:
            return
        rows = [[step, text, wandb.Image(str(path))] for path, text in pairs]
        try:
            self.log({"step": step, table: wandb.Table(columns=["step", "caption", "image"], data=rows)})
        except Exception as error:  # W&B stages a table's images in its data folder, which may not be writable
            logger.warning("W&B does not take the table of samples of step %d (%s)", step, reason(error))

    def log_page(self, key: str, page: str, summary: Mapping[str, Any], step: int) -> None:
        """Logs a self-contained page, as HTML, and values for the run's summary."""
        import wandb

        self.log({"step": step, key: wandb.Html(io.StringIO(page), inject=False)})
        self.run.summary.update(dict(summary))

    def log_artifact(self, kind: str, files: Mapping[str, Path]) -> None:
        """Stores files (name -> path) as a new version of the artifact `<kind>-<run id>`, uploaded in the background.

        TimeoutError if W&B no longer answers.
        """
        import wandb

        artifact = wandb.Artifact(f"{kind}-{self.run.id}", type=kind)
        for name, path in files.items():
            # Upload the file in place: by default W&B keeps copies in the user's home folder.
            artifact.add_file(str(path), name=name, policy="immutable", skip_cache=True)
        before = time.monotonic()
        logged = self.run.log_artifact(
            artifact
        )  # asks the server first, for 19 seconds at most, and ignores that it is silent
        if self._mode == "online" and time.monotonic() - before > LIMITS["init_timeout"]:
            raise TimeoutError("it does not answer")
        self._uploads.append((logged, sum(path.stat().st_size for path in files.values())))

    def finish(self) -> None:
        """Uploads what remains and ends the run. Raises an error with advice if W&B does not take it in time.

        The time grows with the size of the artifacts, so that a slow network is no failure. An offline run ends at once.
        """
        if self._mode == "online":
            until = (
                time.monotonic() + LIMITS["finish_timeout"] + sum(size for _, size in self._uploads) / SLOWEST_UPLOAD
            )
            with contextlib.suppress(Exception):  # the end of the run has a limit of its own, and reports
                for artifact, _ in self._uploads:
                    artifact.wait(timeout=max(until - time.monotonic(), 1))
        try:
            self.run.finish()
        except Exception as error:
            what = "did not take everything in time" if isinstance(error, TimeoutError) else f"failed ({reason(error)})"
            raise TimeoutError(f"W&B {what}{self.give_up()}") from error

    def give_up(self) -> str:
        """Ends the run as far as W&B takes it within its limit; returns how what it did not take is uploaded later."""
        stop_service()
        return f"; `wandb sync {word(str(Path(self.run.settings.sync_dir)))}` uploads the rest later"
