"""The parts of a plan that have words of their own: device, samples, checkpoints, repeats, caches and speed.

Each part says itself for the terminal (`describe`) and for plan.json (`dataclasses.asdict`).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.compute
import torch

from sushi_research.adapters import metadata
from sushi_research.caches.inputs import Inputs
from sushi_research.config.command_line import config_to_dict
from sushi_research.config.keys import default_values
from sushi_research.data.image_folder import repeats_of
from sushi_research.data.items import Items
from sushi_research.errors import UserError, some
from sushi_research.fast.decision import decide
from sushi_research.files import size_text
from sushi_research.models import storage
from sushi_research.models.storage import Storage
from sushi_research.runs import identity, machine, measured
from sushi_research.runs.job import Job
from sushi_research.runs.measured import Measured
from sushi_research.runs.run_folder import RunFolder
from sushi_research.sampling import prompts as sample_prompts
from sushi_research.training.length import Due, Interval

# How many prompts, and how many folders of repeats, are printed; plan.json has all.
SHOWN_PROMPTS, SHOWN_FOLDERS = 10, 8
# Letters of a prompt that are shown: about its first two lines.
SHOWN_LETTERS = 200
# The column of the text in a plan's lines.
INDENT = " " * 13


@dataclass(frozen=True)
class DevicePlan:
    """The device that is trained on and the precision, and why they are these. `memory_gib` is that of the device."""

    name: str
    memory_gib: float
    reason: str
    precision: str
    precision_reason: str

    def describe(self) -> str:
        return f"{self.name}, {self.memory_gib:.1f} GiB{f', {self.reason}' if self.reason else ''}"


def device_of(job: Job) -> DevicePlan:
    """The device and the precision of a job."""
    device = str(job.device)
    facts = machine.hardware(device)
    reason = ""
    if job.device.type != "cuda":
        # Where there is a GPU, only the launcher asks for the CPU.
        why = "the launcher's --cpu asks for the CPU" if torch.cuda.is_available() else machine.why_no_gpu()
        reason = f"{_count(facts['threads'], 'thread')}: {why}"
    elif job.world > 1:
        reason = f"that of the first of {job.world} processes"
    memory = facts["gpu_memory_gib"] or facts["memory_gib"]
    return DevicePlan(machine.device_name(device), memory, reason, job.precision, job.precision_reason)


@dataclass(frozen=True)
class BaseWeights:
    """How the frozen UNet's weights are held (model.base_storage), their bytes, and their bytes in the compute dtype."""

    storage: Storage
    bytes: int
    compute_bytes: int

    def describe(self) -> list[str]:
        """The line of a plan, unless the weights are held in the compute dtype."""
        if self.storage == "compute":
            return []
        linear = "in int8" if self.storage == "int8" else f"linear in {self.storage}, convolutions in int8"
        return [
            f"storage      the UNet's layers {linear}: {size_text(self.bytes)} of weights instead of "
            f"{size_text(self.compute_bytes)}; this changes what is learned (docs/small_base.md)"
        ]


def base_weights_of(job: Job, unet: Any) -> BaseWeights:
    """The bytes of the base's UNet on the device. `unet` is empty and has no adapter yet."""
    held = job.config.model.base_storage
    sizes = {each: storage.weight_bytes(unet, job.compute_dtype, each) for each in (held, "compute")}
    return BaseWeights(held, sizes[held], sizes["compute"])


@dataclass(frozen=True)
class CachePlan:
    """How many entries of a cache are needed, how many of them are missing, and the bytes of all needed entries."""

    needed: int
    missing: int
    bytes: int

    def describe(self, what: str, verb: str = "") -> str:
        return f"{self.missing} of {self.needed} {what}{verb} ({size_text(self.bytes)}{' in all' if verb else ''})"


@dataclass(frozen=True)
class Repeats:
    """How many images of a folder an epoch shows, and how often each. "" is for images in no folder named like 10_cats."""

    folder: str
    images: int
    repeats: int


def repeats_by_folder(items: Items) -> tuple[Repeats, ...]:
    """The repeats of the items of an epoch; none if each image is shown once."""
    samples = items.used
    if (samples.repeats == 1).all():
        return ()
    folders = pyarrow.compute.replace_substring_regex(samples.names, r"[^/]*$", "")
    table = pyarrow.table({"folder": folders, "repeats": samples.repeats})
    counts: Counter[tuple[str, int]] = Counter()
    for row in table.group_by(["folder", "repeats"]).aggregate([([], "count_all")]).to_pylist():
        counts[repeats_of(f"{row['folder']}image")[0], row["repeats"]] += row["count_all"]
    return tuple(Repeats(folder, images, repeats) for (folder, repeats), images in sorted(counts.items()))


def describe_repeats(repeats: tuple[Repeats, ...]) -> list[str]:
    """The line of a plan, if there is something to say."""
    parts = [
        f"{each.folder or 'the others'}: {each.images} image{'s' if each.images > 1 else ''} x {each.repeats}"
        for each in repeats
    ]
    return [f"repeats      {some(parts, SHOWN_FOLDERS)} (the number in a folder's name)"] if parts else []


@dataclass(frozen=True)
class SamplePlan:
    """The sample grids of a run: `times` of them, each with so many images of the prompts with these labels. `often` says when.

    `long` is the number of prompts and negative prompts that are longer than 77 tokens.
    """

    prompts: tuple[str, ...]
    images: int
    times: int
    often: str
    long: int = 0

    def describe(self) -> list[str]:
        shown = [INDENT + _beginning(label) for label in self.prompts[:SHOWN_PROMPTS]]
        if len(self.prompts) > SHOWN_PROMPTS:
            shown.append(f"{INDENT}and {len(self.prompts) - SHOWN_PROMPTS} more (a run's plan.json lists all)")
        if self.long:
            are = f"{_count(self.long, 'prompt')} longer than 77 tokens {'are' if self.long > 1 else 'is'}"
            shown.append(f"{INDENT}{are} read in chunks of 75, as ComfyUI and A1111 do: nothing is cut")
        what = f"{_count(self.images, 'image')} of {_count(len(self.prompts), 'prompt')}"
        return [f"samples      {what}, {_count(self.times, 'time')}: {self.often}", *shown]


def samples_of(job: Job, inputs: Inputs, steps: int, due: Due) -> SamplePlan | None:
    """The sample grids of a run; None if it has none."""
    config = job.config.sample
    if not config.enabled:
        return None
    ends = "before and after training"
    times = 2 + due.sample.count(0, steps - 1)
    often = f"{ends}, and {how_often(config.every, due.sample)}" if times > 2 else ends
    images = sample_prompts.of_run(job.config, inputs.prompts)
    prompts = {image.number: image.prompt_label for image in images}
    return SamplePlan(tuple(prompts.values()), len(images), times, often, len(inputs.long_prompts))


@dataclass(frozen=True)
class CheckpointPlan:
    """The checkpoints of a run: `times` in all, of which the latest `kept` stay. `often` says when.

    Each has an adapter file; the latest `kept_adapters` of those on the way stay (None: all). `metadata` says what is in the files.
    """

    times: int
    kept: int
    often: str
    kept_adapters: int | None
    metadata: str

    def describe(self) -> list[str]:
        kept = "" if self.times <= self.kept else f"; the latest {self.kept} are kept"
        on_the_way = self.times - 1
        files = "NAME.safetensors"
        if on_the_way and self.kept_adapters != 0:
            files += f", and NAME-STEP.safetensors for {_count(on_the_way, 'checkpoint')} before it"
            if self.kept_adapters is not None and self.kept_adapters < on_the_way:
                files += f", of which the latest {self.kept_adapters} {'is' if self.kept_adapters == 1 else 'are'} kept"
        return [
            f"checkpoints  {self.times}: {self.often}{kept}",
            f"adapters     {files}",
            f"metadata     {self.metadata}",
        ]


def checkpoints_of(job: Job, steps: int, due: Due) -> CheckpointPlan:
    """The checkpoints of a run of `steps` steps."""
    config = job.config.checkpoint
    times = 1 + due.checkpoint.count(0, steps - 1)
    often = "at the end only"
    if times > 1:
        often = f"{how_often(config.every, due.checkpoint)}{'' if due.checkpoint.at(steps) else ', and at the end'}"
    return CheckpointPlan(times, config.keep, often, config.keep_adapters, metadata.describe(job.config))


def how_often(every: int | float | str, interval: Interval) -> str:
    """A config key `every` in words: "every 250 steps", "every 0.1 of the run (50 steps)", "every 1 epoch (12.5 steps)"."""
    assert interval.steps is not None
    if isinstance(every, int):
        return "every step" if interval.steps == 1 else f"every {_number(interval.steps)} steps"
    unit = " of the run" if isinstance(every, float) else ""
    return f"every {every}{unit} ({_number(interval.steps)} step{'' if interval.steps == 1 else 's'})"


def there_already(job: Job, steps: int) -> str | None:
    """What a command that is no dry run does with the run that is in its folder; None if there is none.

    That the data and the base are still the same is not looked at, because their hashes take time.
    """
    try:
        record = RunFolder(job.run_path, None).record()
    except UserError as error:
        return str(error)
    if record is None:
        return None
    changes = identity.changed_settings(
        record["identity"], config_to_dict(job.config), default_values(type(job.config))
    )
    # A new location of the same data or base is no other setting.
    if changes := [identity.describe(change) for change in changes if change.key not in identity.SAME_CONTENT]:
        return f"{job.run_path} was started with other settings ({'; '.join(changes)}): give another --run.name"
    if record["finished_at"] is not None and steps <= record["finished_at"]:
        return f"{job.run_path} is finished, at step {record['finished_at']}: without --dry-run there is nothing to do"
    return f"{job.run_path} has begun: without --dry-run it goes on from its last checkpoint"


def speed_of(job: Job, parameters: int) -> Measured | None:
    """What was measured on this machine with the settings of the job, whose adapter has so many parameters.

    Only the main process looks.
    """
    if not job.is_main:
        return None
    device, split = str(job.device), {"batch_size": job.config.train.batch_size, "processes": job.world}
    plan = {"architecture": job.model.NAME, "trainable_parameters": parameters, "split": split}
    entry = {
        "precision": job.precision,
        "step_path": decide(job.config, job.device).name,
        "device": machine.device_name(device),
        "machine": machine.hardware(device),
        "resolved_config": config_to_dict(job.config),
    }
    return measured.find(Path(job.config.run.folder), measured.conditions(plan, entry))


def describe_speed(
    found: Measured | None, estimate: float | None, steps: int, global_batch_size: int, folder: str
) -> str:
    """The line of a plan on the time that a run takes. `estimate` are seconds of a step, from other settings on this machine."""
    if found is None and estimate is None:
        return f"speed        not known: no run in {folder} has trained with these settings on this device"
    on_top = "of training in all (caching, samples and evaluations come on top)"
    if found is None:
        return (
            f"speed        about {estimate:.3g} s per step, {duration_text(estimate * steps)} {on_top}: an estimate, from the rate "
            "that other runs reached on this device"
        )
    seconds = found.seconds_per_image * global_batch_size
    return (
        f"speed        about {seconds:.3g} s per step, {duration_text(seconds * steps)} {on_top}, {found.peak_memory_gib:.1f} GiB "
        f"at the peak: as {found.run} took"
    )


def duration_text(seconds: float) -> str:
    """A duration for people: 12 s, 3 min, 1 h 05 min, 2 d 3 h."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def _beginning(text: str) -> str:
    return text if len(text) <= SHOWN_LETTERS else f"{text[: SHOWN_LETTERS - 3]}..."


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _number(steps: Fraction) -> str:
    return f"{float(steps):.4g}" if steps < 1000 else f"{float(steps):,.0f}"
