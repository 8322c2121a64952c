"""The part of a plan about the disk: how much will be written, and whether there is room for it."""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sushi_research.caches.inputs import Inputs
from sushi_research.caches.latent_entries import LatentEntries
from sushi_research.config import TrainingConfig
from sushi_research.data.held_out import DRIFT_CAPTIONS
from sushi_research.errors import UserError
from sushi_research.files import size_text
from sushi_research.planning.memory import LEAST_STATE_BYTES, LEAST_WITH_ARGUMENTS
from sushi_research.runs.job import Job, agree
from sushi_research.runs.run_folder import RunFolder
from sushi_research.sampling.prompts import SamplePrompt
from sushi_research.training.averages import names_of
from sushi_research.training.averages_plan import snapshot_bytes, snapshots_in
from sushi_research.training.length import Due, Interval

# A pixel of a PNG of a photograph, a line of metrics.jsonl, and a row of evaluation.parquet: estimates.
PIXEL_BYTES, METRICS_BYTES, RESULT_BYTES = 2, 700, 40
_CHECKPOINT = re.compile(r"step-(\d{8,})")
_UNFINISHED = re.compile(r"\.step-\d{8,}\.[0-9a-f]{8}\.tmp")


@dataclass(frozen=True)
class DiskPlan:
    """The bytes that will be written in addition to what is there, of files that exist at the same time.

    `adapter` is the size of `adapter_count` files: the last adapter, its average, that of the best step, and those of checkpoints.
    `checkpoints` is the size of the `checkpoint_count` checkpoints that are added; while one is saved, one more than
    `checkpoint.keep` exists. `averages` is the size of the snapshots of ema.post_hoc. These and `cache` are lower bounds. `others`
    (images, results, metrics) is an estimate.
    `freed` is removed before the last adapter is written: one checkpoint, if one more than `checkpoint.keep` existed.
    """

    cache: int
    checkpoints: int = 0
    checkpoint_count: int = 0
    adapter: int = 0
    others: int = 0
    freed: int = 0
    adapter_count: int = 0
    averages: int = 0

    @property
    def run(self) -> int:
        """The lower bound for the run folder."""
        last = self.adapter // max(1, self.adapter_count)  # the others are there when the last checkpoint is saved
        return self.checkpoints + self.averages + max(self.adapter - last, self.adapter - self.freed)

    def parts(self) -> str:
        """What is written, in words."""
        parts = [f"cache {size_text(self.cache)}"] if self.cache else []
        if self.checkpoints:
            count = "1 checkpoint" if self.checkpoint_count == 1 else f"{self.checkpoint_count} checkpoints"
            parts.append(f"{count} {size_text(self.checkpoints)}")
        if self.adapter:
            count = f"{self.adapter_count} adapter files" if self.adapter_count > 1 else "adapter"
            parts.append(f"{count} {size_text(self.adapter)}")
        parts += [f"snapshots of averages {size_text(self.averages)}"] if self.averages else []
        parts += [f"samples and results about {size_text(self.others)}"] if self.others else []
        return ", ".join(parts) or "nothing"

    def to_json(self) -> dict[str, Any]:
        """The part of plan.json."""
        return asdict(self)


@dataclass(frozen=True)
class Room:
    """A file system with the folders on it that are written to: the bytes that it needs at least, about, and has.

    `free` is what it says to have for this user; more than `most` it has for nobody. Both are None if it does not say.
    """

    folders: dict[str, Path]
    least: int
    about: int
    free: int | None
    most: int | None

    def describe(self) -> str:
        free = "unknown space" if self.free is None else size_text(self.free)
        return f"{free} free on the disk of {' and '.join(str(path) for path in self.folders.values())}"


def plan_run(
    job: Job, cache: int, steps: int, due: Due, parameters: int, images: Sequence[SamplePrompt] = ()
) -> DiskPlan:
    """What a run of `steps` steps with so many trained parameters will write; `cache` is that of `cache_bytes`.

    `images` are the sample images of a step.
    """
    config, folder = job.config, job.run_path
    saved, unfinished = _saved(folder / "checkpoints")
    last = min(max([_finished_at(folder), *saved]), steps)
    run = RunFolder(folder, None)
    is_finished = last == steps and run.adapter.is_file()
    saves = _events(due.checkpoint, last, steps)
    count = max(1, min(config.checkpoint.keep + 1 - len(saved), saves)) if saves else 0
    known = LEAST_WITH_ARGUMENTS if config.optimizer.kwargs else LEAST_STATE_BYTES
    # Other optimizers may keep no state.
    each = int(parameters * (4 + 4 * len(names_of(config.ema)) + known.get(config.optimizer.name, 0)))
    on_the_way, keep = max(0, saves - 1), config.checkpoint.keep_adapters  # the last checkpoint's is the adapter itself
    if keep is not None:
        on_the_way = min(on_the_way, max(0, keep - len(run.step_adapters())))
    files = 0 if is_finished else 1 + (config.ema.decay is not None) + config.evaluation.keep_best + on_the_way
    pixels = sum(image.width * image.height for image in images)
    # Each image, the grid of its step, and its part of progress.png, which shows at most eight steps.
    samples = PIXEL_BYTES * pixels * (2 * (_events(due.sample, last, steps) + (not saved)) + 8)
    return DiskPlan(
        cache=0 if is_finished else cache,
        # What a killed save left is removed first.
        checkpoints=max(0, count * each - unfinished),
        checkpoint_count=count,
        adapter=files * parameters * (4 if config.lora.save_dtype == "float32" else 2),
        adapter_count=files,
        averages=snapshots_in(job, steps, due, last) * snapshot_bytes(job, parameters),
        others=0
        if is_finished
        else samples
        + _picture_bytes(config, _events(due.evaluation, last, steps) + (not saved))
        + METRICS_BYTES * (steps - last),
        freed=each if saves and len(saved) + saves > config.checkpoint.keep else 0,
    )


def _picture_bytes(config: TrainingConfig, evaluations: int) -> int:
    """The bytes of the pictures that are measured at so many evaluations. Buckets have about data.resolution^2 pixels."""
    evaluation, side = config.evaluation, config.data.resolution
    kept = len(DRIFT_CAPTIONS if evaluation.drift_captions is None else evaluation.drift_captions)
    pixels = evaluation.pictures * side**2
    pixels += min(evaluation.pictures, kept) * (config.sample.width or side) * (config.sample.height or side)
    return PIXEL_BYTES * pixels * evaluations


def cache_bytes(job: Job, inputs: Inputs, latents: LatentEntries, text_chunks: np.ndarray) -> int:
    """The bytes of missing cache entries, without the little that the files need besides.

    `latents` are those of `Inputs.missing_latents`, `text_chunks` those of `Inputs.missing_text_chunks`.
    """
    return latents.bytes + inputs.missing_masks().bytes + text_bytes(job, inputs) * int(text_chunks.sum())


def require_room_for_cache(job: Job, inputs: Inputs) -> None:
    """`require_room` for a command that fills the caches and trains no run."""
    plan = DiskPlan(cache_bytes(job, inputs, inputs.missing_latents(), inputs.missing_text_chunks()))
    require_room(job, plan, rooms_of(job, plan))


def text_bytes(job: Job, inputs: Inputs) -> int:
    """The bytes of a caption's entry, 2 per value."""
    return 2 * sum(math.prod(shape) for shape in job.model.text_shapes(inputs.base).values())


def rooms_of(job: Job, plan: DiskPlan) -> list[Room]:
    """The file systems that are written to. A folder that does not exist yet counts as on that of the nearest one above it."""
    cache = Path(job.config.cache.folder)
    needs = {"cache.folder": (cache, plan.cache, plan.cache)}
    parts = {"cache.folder": [cache, cache / "latents", cache / f"text_{job.model.NAME}"]}
    if plan != DiskPlan(plan.cache):
        run = job.run_path  # a command that trains no run has none
        needs["run.folder"] = (run, plan.run, plan.run + plan.others)
        parts["run.folder"] = [run, run / "checkpoints"]
    disks: dict[Any, list[str]] = {}
    for key in needs:
        disks.setdefault(frozenset(_device(_existing(part)) for part in parts[key]), []).append(key)
    found = []
    for devices, keys in disks.items():
        folders = {key: needs[key][0] for key in keys}
        least, about = (sum(needs[key][number] for key in keys) for number in (1, 2))
        # A folder whose parts are on several disks is not judged. Two folders of one disk may have quotas of their own.
        places = {_existing(folder) for folder in folders.values()}
        spaces = [_space(place) for place in places] if len(devices) == 1 else [None]
        known = [] if None in spaces else spaces
        free, most = (max((space[number] for space in known), default=None) for number in (0, 1))
        found.append(Room(folders, least, about, free, most))
    return found


def require_room(job: Job, plan: DiskPlan, rooms: Sequence[Room]) -> None:
    """UserError if a disk has certainly too little room for what will be written; a warning is printed if it probably has.

    Only the main process looks, and all processes end if it has an error.
    """
    error = None
    for room in rooms if job.is_main else ():
        if room.free is None or room.free >= room.about:
            continue
        is_too_little = room.most < room.least
        keys = " or ".join(f"--{key}" for key in room.folders)
        advice = f"free {size_text(room.about - room.free)} there, or give {keys} on another disk"
        if "run.folder" in room.folders and plan.checkpoint_count > 1:
            advice += ", or lower --checkpoint.keep"
        if "run.folder" in room.folders and plan.adapter_count > 2:
            advice += ", or lower --checkpoint.keep_adapters"
        needs = f"at least {size_text(room.least)}" if is_too_little else f"about {size_text(room.about)}"
        sentence = f"{room.describe()}, and {needs} will be written there ({plan.parts()}): {advice}"
        if is_too_little:
            error = error or UserError(f"too little space: {sentence}.")
        else:
            job.say(f"warning: {sentence}")
    agree(error)


def _events(due: Interval, last: int, steps: int) -> int:
    """How often something is done after step `last`, at the end of the run too."""
    return due.count(last, steps - 1) + 1 if last < steps else 0


def _saved(checkpoints: Path) -> tuple[list[int], int]:
    """The steps of the checkpoints in a folder, and the bytes that unfinished ones take."""
    try:
        names = os.listdir(checkpoints)
    except OSError:  # no such folder, or one that the run reports
        return [], 0
    unfinished = [name for name in names if _UNFINISHED.fullmatch(name)]
    left = sum(_size(path) for name in unfinished for path in (checkpoints / name).glob("*"))
    return [int(match[1]) for match in map(_CHECKPOINT.fullmatch, names) if match], left


def _size(path: Path) -> int:
    """The bytes of a file, 0 if it is gone: a dry run can look on while a run saves."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _finished_at(folder: Path) -> int:
    """The step at which the run finished; 0 if it did not, or if its run.json is damaged, which is reported later."""
    try:
        record = RunFolder(folder, None).record()
    except UserError:
        return 0
    return (record and record["finished_at"]) or 0


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    folder = Path(os.path.abspath(folder))
    return next(path for path in (folder, *folder.parents) if path == path.parent or os.path.isdir(path))


def _device(folder: Path) -> Any:
    try:
        return os.stat(folder).st_dev
    except OSError:
        return folder


def _space(folder: Path) -> tuple[int, int] | None:
    """`free` and `most` of a Room; None if the file system does not say."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return None
    # Some file systems reserve blocks for root: ext4 five percent.
    reserved = usage.total - usage.used - usage.free if hasattr(os, "geteuid") and os.geteuid() == 0 else 0
    return (usage.free, usage.free + max(0, reserved)) if usage.total else None
