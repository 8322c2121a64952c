"""Reads the data of a config: training items, held-out items, and the texts to encode."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sushi_research.config import TrainingConfig
from sushi_research.config.keys import default_values
from sushi_research.config.prompts import Prompt, as_prompts, read_prompts, texts_of
from sushi_research.config.yaml12 import show
from sushi_research.data import dataset, findings, prior_images
from sushi_research.data.buckets import BucketRule
from sushi_research.data.findings import LARGE_CROP
from sushi_research.data.held_out import DRIFT_CAPTIONS, held_out_items, hold_out, require_separate, trained_items
from sushi_research.data.image_folder import repeats_of
from sushi_research.data.prior_images import PriorImages
from sushi_research.data.samples import Crop, Item, Items, Problem, Scan, make_items
from sushi_research.errors import UserError
from sushi_research.fingerprints import HashCache
from sushi_research.runs.job import Job


@dataclass(frozen=True)
class Data:
    """The items of an epoch, and the scan that says which files are used, which are not, and why.

    `held_out` items are for evaluation only. `near_duplicates` has a sentence for each that resembles a training image.
    `prior` items are images of `evaluation.prior_path` that are not trained on, `trained` those training items that are
    measured next to the held-out ones; `prior_trained` are the hashes of prior images that are trained on. `evaluation_scan`
    and `prior_scan` are the scans of `evaluation.path` and `evaluation.prior_path`; they have names of their own.
    """

    items: Items
    scan: Scan
    held_out: Sequence[Item] = field(default_factory=list)
    near_duplicates: list[str] = field(default_factory=list)
    evaluation_scan: Scan | None = None
    prior: Sequence[Item] = field(default_factory=list)
    trained: Sequence[Item] = field(default_factory=list)
    prior_scan: Scan | None = None
    prior_trained: frozenset[str] = frozenset()

    @property
    def measured(self) -> list[Item]:
        """The items that losses are measured on."""
        return [*self.held_out, *self.prior, *self.trained]

    @property
    def _other_scans(self) -> dict[str, Scan]:
        scans = {"evaluation.path": self.evaluation_scan, "evaluation.prior_path": self.prior_scan}
        return {key: scan for key, scan in scans.items() if scan}

    @property
    def problems(self) -> list[Problem]:
        """What cannot be used in each folder. Names of the other folders than `data.path` say so."""
        others = [(key, each) for key, scan in self._other_scans.items() for each in scan.problems]
        return [*self.scan.problems, *(Problem(f"{key}: {each.name}", each.reason) for key, each in others)]

    @property
    def notes(self) -> list[str]:
        """The notes on all folders, as `findings.summary` shortens them."""
        others = [f"{key}: {note}" for key, scan in self._other_scans.items() for note in findings.summary(scan)]
        return [*findings.summary(self.scan), *others]


def read_data(job: Job, hash_cache: HashCache) -> Data:
    """Scans the data, assigns every image to its bucket, and reports unusable files.

    Raises UserError if a file cannot be used and `data.on_bad_file` is "stop". A new run then gets a data_report.json.
    """
    config, run, accelerator = job.config, job.run, job.accelerator
    run_folder = run.path if run else Path(config.run.folder) / (config.run.name or "a run")
    read = functools.partial(
        dataset.scan,
        image_column=config.data.image_column,
        caption_column=config.data.caption_column,
        hash_cache=hash_cache,
        show_progress=accelerator.is_main_process,
        outputs={Path(config.cache.folder): "the cache folder", run_folder: "the run folder"},
    )
    separate, prior_scan, prior_path = None, None, config.evaluation.prior_path
    # The main process reads the files first. The others then find them in the hash cache.
    with accelerator.main_process_first():
        hash_cache.load()
        scan = read(config.data.path, split=config.data.split, revision=config.data.revision)
        if config.evaluation.path is not None:
            revision = config.data.revision if config.evaluation.path == config.data.path else None
            separate = read(
                config.evaluation.path,
                split=config.evaluation.split or config.data.split,
                revision=revision,
                key="evaluation.path",
            )
        if prior_path is not None and not prior_images.below(scan, prior_path):
            revision = config.data.revision if prior_path == config.data.path else None
            prior_scan = read(prior_path, split=config.data.split, revision=revision, key="evaluation.prior_path")
    folder = os.path.basename(os.path.abspath(config.data.path))
    if (repeats := repeats_of(f"{folder}/image")[1]) > 1 and not scan.is_table:
        # As with kohya's scripts, what counts are the names of the folders below.
        hint = f"give the folder above it for {repeats} repeats"
        scan.notes.insert(0, f"{folder}: the number in its name is not used, because it is data.path itself: {hint}")
    rule = bucket_rule(config)
    scans = [each for each in (scan, separate, prior_scan) if each]
    _require_effect(config, scans, separate)
    for each in scans:
        drop_too_small(each, rule)
    # Write the report now in case require_clean raises, but do not overwrite that of a run that has already started.
    report = run.data_report if run and run.record() is None else None
    if accelerator.is_main_process and any(each.problems for each in scans):
        if report is not None:
            dataset.write_report(scan, report, separate, prior_scan)
        elif job.dry_run:
            with job.dry_run.optional():
                dataset.write_report(scan, job.dry_run.data_report, separate, prior_scan)
                report = job.dry_run.data_report
    for each in scans:
        dataset.require_clean(each, config.data.on_bad_file, report)
    held, near_duplicates = [], []
    inside = [] if prior_path is None or prior_scan else prior_images.below(scan, prior_path)
    if config.evaluation.held_out:
        held = hold_out(scan, config.evaluation.held_out, {sample.image_hash for sample in inside})
    elif separate:
        held, near_duplicates = separate.samples, require_separate(separate, scan)
    prior = PriorImages()
    if prior_scan:
        prior_images.require_not_held_out(prior_scan, held)
        near_duplicates += require_separate(prior_scan, scan, "evaluation.prior_path")
        prior = PriorImages(prior_scan.samples)
    elif prior_path is not None:
        prior = prior_images.hold_out_prior(scan, prior_path, inside)
    items, _ = make_items(scan.samples, rule)
    return Data(
        items,
        scan,
        held_out_items(held, rule),
        near_duplicates,
        separate,
        held_out_items(prior.samples, rule),
        trained_items(items, len({sample.image_hash for sample in held}), prior.trained),
        prior_scan,
        prior.trained,
    )


def _require_effect(config: TrainingConfig, scans: Sequence[Scan], separate: Scan | None) -> None:
    """UserError if a setting is for HF datasets, and the images are in folders. `effects.py` has what a config alone tells."""
    defaults, data = default_values(type(config)), config.data
    given = {}
    if not any(scan.is_table for scan in scans):
        given = {"data.split": data.split, "data.image_column": data.image_column}
    if separate and not separate.is_table:
        given["evaluation.split"] = config.evaluation.split
    for key, value in given.items():
        if value != defaults[key]:
            sources = " and ".join(scan.source for scan in ([separate] if key == "evaluation.split" else scans) if scan)
            raise UserError(
                f"{key} is {value}, which has no effect: {sources} holds image files, and only HF datasets have splits and "
                f"columns; remove {key}, or set it to {show(defaults[key])}."
            )


def drop_too_small(scan: Scan, rule: BucketRule) -> None:
    """Makes a problem of each sample that fits no bucket, and records which lose much to their bucket's crop."""
    items, too_small = make_items(scan.samples, rule)
    dropped = {problem.name for problem in too_small}
    scan.samples = [sample for sample in scan.samples if sample.name not in dropped]
    scan.problems = sorted([*scan.problems, *too_small], key=lambda problem: (problem.name, problem.reason))
    geometries = {item.sample.name: item.geometry for item in items}
    crops = [
        Crop(name, round(geometry.cut_away, 3), f"{geometry.width}x{geometry.height}")
        for name, geometry in geometries.items()
        if geometry.cut_away > LARGE_CROP
    ]
    scan.cropped = sorted(crops, key=lambda crop: (-crop.lost, crop.name))


def bucket_rule(config: TrainingConfig) -> BucketRule:
    """The bucket rule of a config."""
    return BucketRule(
        resolution=config.data.resolution,
        step=config.data.bucket_step,
        min_side=config.data.bucket_min_side or config.data.resolution // 2,
        max_side=config.data.bucket_max_side or config.data.resolution * 2,
        upscale=config.data.upscale,
    )


def prompts_of(config: TrainingConfig, items: Sequence[Item]) -> list[Prompt]:
    """The prompts for sample images: those of the config or of its file, or else the first three distinct captions.

    Raises UserError if the file cannot be used.
    """
    if not config.sample.enabled:
        return []
    if config.sample.prompts_file is not None:
        return read_prompts(config.sample.prompts_file, "sample.prompts_file")
    captions = dict.fromkeys(item.sample.caption for item in items)
    return as_prompts(config.sample.prompts or list(captions)[:3])


def captions_of(config: TrainingConfig, data: Data) -> set[str]:
    """Every distinct text that is encoded as a caption, so cut to 77 tokens: captions, drift captions, and the empty text.

    The negative prompt is one of them if pictures are measured, because these are generated from captions as they were trained.
    """
    captions = {item.sample.caption for item in [*data.items, *data.measured]}
    negative = {config.sample.negative_prompt} if config.evaluation.pictures else set()
    return {"", *captions, *drift_captions(config, data), *negative}


def prompt_texts(config: TrainingConfig, prompts: Sequence[Prompt]) -> set[str]:
    """The texts that sample images are generated from: prompts and negative prompts."""
    return {config.sample.negative_prompt, *texts_of(prompts)} if prompts else set()


def drift_captions(config: TrainingConfig, data: Data) -> list[str]:
    """The captions for measuring the drift from the base, in order, without captions that are trained on."""
    if not data.held_out:
        return []
    asked = config.evaluation.drift_captions
    trained = {item.sample.caption for item in data.items}
    return [caption for caption in dict.fromkeys(DRIFT_CAPTIONS if asked is None else asked) if caption not in trained]
