"""The run folder: its files, its record and its lock."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sushi_research.errors import UserError
from sushi_research.files import write_json
from sushi_research.runs import dry_run, records
from sushi_research.runs.folder_lock import NOTE, FolderLock
from sushi_research.temporaries import remove_leftovers
from sushi_research.user_files import kind_of

if TYPE_CHECKING:
    pass

# Increment it when the meaning of run.json or of an identity's facts changes.
FORMAT = 2
# The result files (evaluation/results.py): one for each set that a run can be measured on (evaluation/measured_sets.py).
RESULT_FILES = {
    "validation": "evaluation.parquet",
    "drift": "drift.parquet",
    "base_images": "base_images.parquet",
    "prior": "prior.parquet",
    "trained": "trained.parquet",
    "pictures_learned": "pictures_learned.parquet",
    "pictures_kept": "pictures_kept.parquet",
}
_STEP = re.compile(r"-([0-9]{6,18})\.safetensors$")


class RunFolder:
    """The paths and the record of one run. Only the process that opened it as the writer may write to it."""

    def __init__(self, path: Path, lock: FolderLock | None) -> None:
        self.path = path
        self.name = path.name or os.path.basename(os.path.abspath(path))
        self.config = path / "config.yaml"
        self.plan = path / "plan.json"
        self.data_report = path / "data_report.json"
        self.metrics = path / "metrics.jsonl"
        self.results = {measured: path / name for measured, name in RESULT_FILES.items()}
        self.evaluation = self.results["validation"]
        self.drift = self.results["drift"]
        self.validation_set = path / "validation_set.json"
        self.samples = path / "samples"
        self.pictures = path / "pictures"
        self.checkpoints = path / "checkpoints"
        self.adapter = path / f"{self.name}.safetensors"
        # The average of ema.decay at the newest checkpoint, and the snapshots of ema.post_hoc.
        self.average = path / f"{self.name}_ema.safetensors"
        self.averages = path / "ema"
        # Adapter files of steps after the one from which the run started or went on.
        self.earlier = path / "earlier"
        self.curves = path / "loss.png"
        self.report = path / "report.html"
        # The training images on the page, reduced (reports/training_images.py).
        self.thumbnails = path / "thumbnails.json"
        self.stage_timings = path / "stage_timings.json"
        self.provenance = path / "provenance.json"
        # Of the user's own command (reports/scores.py).
        self.scores = path / "scores.json"
        self.scores_source = path / "scores_source.json"
        self.run = path / "run.json"
        # Of a run with the schedule range_test: that a loss or gradient that is not finite ended it.
        self.not_finite = path / "not_finite.json"
        self._lock = lock

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Releases the lock."""
        if self._lock is not None:
            self._lock.close()

    def note_stop(self) -> None:
        """Notes for others that the run was asked to stop (`FolderLock.note_stop`). Only with the lock."""
        if self._lock is not None:
            self._lock.note_stop()

    def lost(self) -> UserError | None:
        """The error of a run whose folder was moved, deleted or replaced; None if it is there, or without the lock."""
        try:
            if self._lock is not None:
                self._lock.require_same()
        except UserError as error:
            return error
        return None

    def best_adapter(self, step: int) -> Path:
        """The file that evaluation.keep_best writes of a step."""
        return self.path / f"{self.name}-best-{step:06d}.safetensors"

    def step_adapter(self, step: int) -> Path:
        """The adapter file of a step on the way."""
        return self.path / f"{self.name}-{step:06d}.safetensors"

    def step_adapters(self) -> dict[int, Path]:
        """The adapter files of steps on the way that there are, by step in rising order."""
        return self._files_by_step(self.step_adapter)

    def best_adapters(self) -> dict[int, Path]:
        """The files of evaluation.keep_best that there are, by step in rising order."""
        return self._files_by_step(self.best_adapter)

    def _files_by_step(self, file_of: Callable[[int], Path]) -> dict[int, Path]:
        steps = (int(match[1]) for name in _names(self.path) if (match := _STEP.search(name)))
        return {step: file_of(step) for step in sorted(set(steps)) if os.path.lexists(file_of(step))}

    def remove_leftovers(self) -> None:
        """Removes the temporary files of killed writers (those of checkpoints: `latest_checkpoint`). Only with the lock."""
        for folder in (
            self.path,
            self.averages,
            self.samples,
            *self.samples.glob("step-*"),
            *self.pictures.glob("step-*"),
        ):
            remove_leftovers(folder)

    def remove_if_empty(self) -> None:
        """Removes the folder if the run was refused before anything was written into it; what a dry run wrote stays. Only with the
        lock."""
        if self._lock is None or self.lost() is not None:
            return
        names = {path.name for path in self.path.iterdir()}
        if names <= {NOTE}:
            shutil.rmtree(self.path, ignore_errors=True)
        elif names == {NOTE, dry_run.FOLDER}:
            (self.path / NOTE).unlink(missing_ok=True)

    def require_kinds(self) -> None:
        """UserError if something else is in the place of a file or a folder of a run, such as a folder, a FIFO or a broken link."""
        files = [self.run, self.config, self.plan, self.provenance, self.metrics, self.stage_timings, self.data_report]
        files += [
            self.validation_set,
            *self.results.values(),
            self.adapter,
            self.average,
            self.curves,
            self.report,
            self.thumbnails,
            self.scores,
            self.scores_source,
            *self.step_adapters().values(),
            *self.best_adapters().values(),
        ]
        wrong = [(path, "a file") for path in files if os.path.lexists(path) and not path.is_file()]
        folders = [self.samples, self.pictures, self.checkpoints, self.earlier, self.averages]
        folders += [self.path / "wandb", self.path / "tensorboard"]
        wrong += [(path, "a folder") for path in folders if os.path.lexists(path) and not path.is_dir()]
        for path, wanted in wrong:
            raise UserError(
                f"{path} is {kind_of(path)}, and a run has {wanted} there: move it away, then run the same command again"
            )

    def record_files(self) -> list[Path]:
        """The existing files that record the run, including the samples and pictures of the first and last step that has some."""
        files = [self.run, self.config, self.plan, self.provenance, self.metrics, self.stage_timings]
        files += [self.validation_set, *self.results.values(), self.scores, self.scores_source]
        images = []
        for folder in (self.samples, self.pictures):
            steps = sorted(path for path in folder.glob("step-*") if path.is_dir())
            images += [image for step in {*steps[:1], *steps[-1:]} for image in sorted(step.glob("*.png"))]
        return [path for path in files if path.exists()] + sorted(images)

    def record(self) -> dict[str, Any] | None:
        """The content of run.json: format, identity, steps, finished_at, wandb_id. None if the run has not started.

        UserError if the file is damaged or of another version, or, with the lock, if the folder is another one now.
        """
        if self._lock is not None:
            self._lock.require_same()
        if not os.path.lexists(self.run):
            return None
        remedy = (
            "restore it, or remove it so that the same command goes on from the last checkpoint (or begins, without one), or give "
            "another --run.name"
        )
        record = records.read_json(self.run, remedy)
        if problem := format_problem(self.run, record):
            raise UserError(f"{problem}, or give another --run.name")
        return records.fitting(record, records.RunRecord, str(self.run), remedy)

    def starts_from_file(self) -> bool:
        """Whether the run starts from an adapter file, so that its step 0 is not the base. False if run.json does not say."""
        try:
            record = self.record()
        except UserError:
            return False
        return record is not None and "facts.start_from" in record["identity"]

    def mark_started(self, identity: dict[str, Any], steps: int) -> dict[str, Any]:
        """Records that the run starts, with a new W&B id. Returns the record."""
        record = {
            "format": FORMAT,
            "steps": steps,
            "finished_at": None,
            # A sweep agent has already created the run in W&B and set its id.
            "wandb_id": sweep_run_id() or secrets.token_hex(4),
            "identity": identity,
        }
        write_json(self.run, record)
        return record

    def mark_continued(self, steps: int, identity: dict[str, Any]) -> dict[str, Any]:
        """Records that the run continues, with a total of `steps` steps. Returns the record.

        `identity` is the current one. It also has the settings that the version that began the run did not know. A run.json that is
        gone is made again, with a new W&B id.
        """
        if self.record() is None:
            return self.mark_started(identity, steps)
        return self._update({"steps": steps, "finished_at": None, "identity": identity})

    def mark_finished(self, step: int) -> dict[str, Any]:
        """Records that the run is finished at `step`. Call it last, after the adapter is written and verified."""
        return self._update({"finished_at": step})

    def _update(self, changes: dict[str, Any]) -> dict[str, Any]:
        record = self.record()
        assert record is not None, "the run has not started"
        record |= changes
        write_json(self.run, record)
        return record


def format_problem(path: Path, record: Any) -> str | None:
    """Why the run.json of another version is not read, and what to do; None for this version's, and for what is no run.json."""
    if not isinstance(record, dict) or "identity" not in record:
        return None
    if type(record.get("format")) is int and record["format"] == FORMAT:
        return None
    found = f"format {json.dumps(record['format'])}" if "format" in record else "no format"
    return f"{path} has {found}, this version reads format {FORMAT}: use the version that wrote it"


def sweep_run_id() -> str | None:
    """The W&B id of this run if a sweep agent started it (wandb_agent.py sets both variables), else None."""
    return os.environ.get("WANDB_RUN_ID") if "WANDB_SWEEP_ID" in os.environ else None


def open_run_folder(folder: Path, name: str, writer: bool = True) -> RunFolder:
    """The run folder `folder/name`, created if it is missing.

    The writer (the main process) locks it (`FolderLock`), until it closes it or ends. The other processes of the run use
    `writer=False`. Raises UserError if the same run is open elsewhere, for example because its command was launched twice, or if
    something else is in the place of one of its files (`require_kinds`).
    """
    path = folder / name
    run = RunFolder(path, FolderLock(path) if writer else None)
    if writer:
        try:
            run.require_kinds()
            run.remove_leftovers()
        except BaseException:
            run.close()
            raise
    return run


def _names(folder: Path) -> list[str]:
    """The names in a folder; none if it is not there."""
    return os.listdir(folder) if folder.is_dir() else []
