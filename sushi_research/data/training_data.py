"""Reads the data of a config: training items, held-out items, and the texts to encode."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

from sushi_research.config import TrainingConfig
from sushi_research.data import dataset
from sushi_research.data.buckets import BucketRule
from sushi_research.data.held_out import DRIFT_CAPTIONS, held_out_items, hold_out, read_separate
from sushi_research.data.samples import Item, make_items
from sushi_research.fingerprints import HashCache
from sushi_research.runs.job import Job


@dataclass(frozen=True)
class Data:
    """The items of an epoch, and the scan that says which files are used, which are not, and why.

    `held_out` items are for evaluation only. `near_duplicates` has a sentence for each that resembles a training image.
    """

    items: list[Item]
    scan: dataset.Scan
    held_out: list[Item] = field(default_factory=list)
    near_duplicates: list[str] = field(default_factory=list)


def read_data(job: Job, hash_cache: HashCache) -> Data:
    """Scans the data, assigns every image to its bucket, and reports unusable files.

    Raises UserError if a file cannot be used and `data.on_bad_file` is "stop". A new run then gets a data_report.json.
    """
    config, run, accelerator = job.config, job.run, job.accelerator
    read = functools.partial(
        dataset.scan,
        image_column=config.data.image_column,
        caption_column=config.data.caption_column,
        hash_cache=hash_cache,
        show_progress=accelerator.is_main_process,
    )
    # The main process reads the files first. The others then find them in the hash cache.
    with accelerator.main_process_first():
        hash_cache.load()
        scan = read(config.data.path, split=config.data.split, revision=config.data.revision)
    rule = bucket_rule(config)
    held, near_duplicates = [], []
    if config.evaluation.held_out:
        held = hold_out(scan, config.evaluation.held_out)
    elif config.evaluation.path is not None:
        with accelerator.main_process_first():
            held, near_duplicates = read_separate(config, scan, read)
    items, too_small = make_items(scan.samples, rule)
    held_items, held_too_small = held_out_items(held, rule)
    too_small += held_too_small
    skipped = {problem.name for problem in too_small}
    scan.samples = [sample for sample in scan.samples if sample.name not in skipped]
    scan.problems = sorted([*scan.problems, *too_small], key=lambda problem: (problem.name, problem.reason))
    # Write the report now in case require_clean raises, but do not overwrite that of a run that has already started.
    report = run.data_report if run and run.record() is None else None
    if accelerator.is_main_process and report is not None:
        dataset.write_report(scan, report)
    dataset.require_clean(scan, config.data.on_bad_file, report)
    return Data(items, scan, held_items, near_duplicates)


def bucket_rule(config: TrainingConfig) -> BucketRule:
    """The bucket rule of a config."""
    return BucketRule(
        resolution=config.data.resolution,
        step=config.data.bucket_step,
        min_side=config.data.bucket_min_side or config.data.resolution // 2,
        max_side=config.data.bucket_max_side or config.data.resolution * 2,
        upscale=config.data.upscale,
    )


def prompts_of(config: TrainingConfig, items: Sequence[Item]) -> list[str]:
    """The prompts for sample images: those of the config, or else the first three distinct captions."""
    if not config.sample.enabled:
        return []
    return list(config.sample.prompts) or list(dict.fromkeys(item.sample.caption for item in items))[:3]


def captions_of(config: TrainingConfig, data: Data, prompts: Sequence[str]) -> list[str]:
    """Every distinct text to encode: captions, drift captions, the empty text, and the prompts of sample images."""
    captions = {item.sample.caption for item in [*data.items, *data.held_out]}
    return sorted({"", config.sample.negative_prompt, *prompts, *captions, *drift_captions(config, data)})


def drift_captions(config: TrainingConfig, data: Data) -> list[str]:
    """The captions for measuring the drift from the base, in order, without captions that are trained on."""
    if not data.held_out:
        return []
    asked = config.evaluation.drift_captions
    trained = {item.sample.caption for item in data.items}
    return [caption for caption in dict.fromkeys(DRIFT_CAPTIONS if asked is None else asked) if caption not in trained]
