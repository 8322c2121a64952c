"""Reads the data of a config: training items, held-out items, and the texts to encode."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sushi_research.config import TrainingConfig
from sushi_research.config.keys import default_values
from sushi_research.config.sets import ResolvedSet, sets_of
from sushi_research.config.yaml12 import show
from sushi_research.data import dataset, findings, near_search, prior_images
from sushi_research.data.captions.of_run import rules_of_sets, run_captions_of
from sushi_research.data.captions.rules import rules_of, with_plain
from sushi_research.data.captions.run_captions import RunCaptions
from sushi_research.data.captions.unused_rules import unused_rules
from sushi_research.data.fitting import drop_too_small, fitting_of
from sushi_research.data.held_out import held_out_items, hold_out, require_separate, trained_items
from sushi_research.data.image_folder import repeats_of
from sushi_research.data.items import Item, Items, make_items
from sushi_research.data.merged_sets import count_uses, folder_names, merged, regularisation_images
from sushi_research.data.prior_images import PriorImages
from sushi_research.data.samples import Samples
from sushi_research.data.scan import Problem, Scan
from sushi_research.errors import UserError
from sushi_research.remembered import NOTHING_REMEMBERED, Remembered
from sushi_research.runs.job import Job


@dataclass(frozen=True)
class Data:
    """The items of an epoch, and the scan that says which files are used, which are not, and why.

    `held_out` items are for evaluation only. `near_duplicates` has a sentence for each that resembles a training image.
    `prior` items are images of `evaluation.prior_path` that are not trained on, `trained` those training items that are
    measured next to the held-out ones; `prior_trained` are the hashes of prior images that are trained on. `evaluation_scan`
    and `prior_scan` are the scans of `evaluation.path` and `evaluation.prior_path`; they have names of their own. `sets` are the
    sets of images that are trained on; `scan` is that of all of them. `remembered` is where results that were computed from the
    data are found again.
    `captions` are those of the items, by the rules of the config.
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
    sets: tuple[ResolvedSet, ...] = ()
    remembered: Remembered = NOTHING_REMEMBERED
    captions: RunCaptions | None = None

    def encodings(self) -> Iterator[tuple[Items, bool]]:
        """(items, mirrored) of all that is encoded: training items with each of their crops, unmirrored and mirrored as far as the
        flip of their set needs it, and measured items unmirrored. An image may be in several of these."""
        for crop in self.items.every_crop():
            probabilities = np.array([each.flip for each in self.sets] or [0.0])[crop.samples.sets[crop.rows]]
            for flip, needed in ((False, probabilities < 1), (True, probabilities > 0)):
                if needed.any():
                    yield (crop if needed.all() else crop.take(needed)), flip
        yield from ((items, False) for items in (self.held_out, self.prior, self.trained) if len(items))

    @cached_property
    def learned(self) -> Items:
        """The training items that are no regularisation images."""
        of_role = [each.index for each in self.sets if each.is_regularisation]
        return self.items.take(~np.isin(self.items.samples.sets[self.items.rows], of_role)) if of_role else self.items

    @property
    def measured(self) -> list[Item]:
        """The items that losses are measured on."""
        return [*self.held_out, *self.prior, *self.trained]

    @property
    def _other_scans(self) -> dict[str, Scan]:
        scans = {"evaluation.path": self.evaluation_scan, "evaluation.prior_path": self.prior_scan}
        return {key: scan for key, scan in scans.items() if scan}

    @property
    def problems(self) -> Sequence[Problem]:
        """What cannot be used in each folder. Names of the other folders than `data.path` say so."""
        others = [(key, each) for key, scan in self._other_scans.items() for each in scan.problems]
        if not others:
            return self.scan.problems
        return [*self.scan.problems, *(Problem(f"{key}: {each.name}", each.reason) for key, each in others)]

    @property
    def notes(self) -> list[str]:
        """The notes on all folders, as `findings.summary` shortens them."""
        others = [f"{key}: {note}" for key, scan in self._other_scans.items() for note in findings.summary(scan)]
        return [*findings.summary(self.scan), *others]


def read_data(job: Job, remembered: Remembered) -> Data:
    """Scans the data, assigns every image to its bucket, and reports unusable files.

    Raises UserError if a file cannot be used and `data.on_bad_file` is "stop". A new run then gets a data_report.json.
    """
    config, run, accelerator = job.config, job.run, job.accelerator
    run_folder = run.path if run else Path(config.run.folder) / (config.run.name or "a run")
    read = functools.partial(
        dataset.scan,
        image_column=config.data.image_column,
        caption_column=config.data.caption_column,
        box_column=config.data.crop_column if config.data.crop == "box" else None,
        caption_source=config.captions.source,
        allow_empty=config.captions.allow_empty,
        remembered=remembered,
        show_progress=accelerator.is_main_process,
        outputs={Path(config.cache.folder): "the cache folder", run_folder: "the run folder"},
    )
    sets = sets_of(config)
    separate, prior_scan, prior_path = None, None, config.evaluation.prior_path
    # The main process reads the files first. The others then find what it remembers.
    with accelerator.main_process_first():
        set_scans = [_read_set(read, each) for each in sets]
        if config.evaluation.path is not None:
            revision = config.data.revision if config.evaluation.path == config.data.path else None
            separate = read(
                config.evaluation.path,
                split=config.evaluation.split or config.data.split,
                revision=revision,
                masks=config.masks,
                measured=True,
                key="evaluation.path",
            )
        prior_places = [] if prior_path is None else prior_images.places_below(set_scans, prior_path)
        if prior_path is not None and not prior_places:
            revision = config.data.revision if prior_path == config.data.path else None
            prior_scan = read(
                prior_path,
                split=config.data.split,
                revision=revision,
                masks=config.masks,
                measured=True,
                key="evaluation.prior_path",
            )
    _require_effect(config, sets, set_scans, separate, prior_scan)
    # The other images are fitted to buckets as `data` says.
    fittings, plain = [fitting_of(config, each) for each in sets], fitting_of(config, None)
    others = [each for each in (separate, prior_scan) if each]
    for each, fitting in [*zip(set_scans, fittings, strict=True), *((each, plain) for each in others)]:
        drop_too_small(each, fitting)
    scan = merged(set_scans, sets)
    rules, measured_rules = rules_of_sets(config), (rules_of(config.captions),)
    scan.notes += unused_rules(config, Samples.of(scan.samples), rules)
    scan.samples = with_plain(Samples.of(scan.samples), rules, remembered)
    for each in others:
        each.samples = with_plain(Samples.of(each.samples), measured_rules, remembered)
    # Write the report now in case require_clean raises, but do not overwrite that of a run that has already started.
    report = run.data_report if run and run.record() is None else None
    if accelerator.is_main_process and any(each.problems for each in (scan, *others)):
        if report is not None:
            dataset.write_report(scan, report, separate, prior_scan)
        elif job.dry_run:
            with job.dry_run.optional():
                dataset.write_report(scan, job.dry_run.data_report, separate, prior_scan)
                report = job.dry_run.data_report
    for each in (*set_scans, scan, *others):
        # All problems of several sets are in one sentence; that a set has no image that can be used is one of its own.
        if each is scan or each in others or not len(each.samples):
            dataset.require_clean(each, config.data.on_bad_file, report)
    held, near_duplicates = [], []
    begins = [f"{folder}/" for folder in folder_names([each.path for each in sets])] if len(sets) > 1 else [""]
    inside = prior_images.below(scan, [(number, begins[number] + prefix) for number, prefix in prior_places])
    kept_back = regularisation_images(scan, sets)
    # The first process compares the images, and the others find the result.
    with accelerator.main_process_first():
        if config.evaluation.held_out:
            excluded = np.concatenate([inside.images, kept_back])
            held = hold_out(scan, config.evaluation.held_out, excluded, remembered)
        elif separate:
            held, near_duplicates = separate.samples, require_separate(separate, scan, remembered=remembered)
        prior = PriorImages()
        if prior_scan:
            prior_images.require_not_held_out(prior_scan, held)
            near_duplicates += require_separate(prior_scan, scan, "evaluation.prior_path", remembered)
            prior = PriorImages(prior_scan.samples)
        elif prior_path is not None:
            prior = prior_images.hold_out_prior(scan, prior_path, inside, remembered)
        items, _ = make_items(count_uses(scan, sets), fittings)
        own = [plain] if separate else fittings
        excluded = np.concatenate([near_search.as_column(prior.trained), kept_back])
        trained = trained_items(items, len(np.unique(Samples.of(held).images)), excluded, remembered)
    return Data(
        items,
        scan,
        held_out_items(held, own),
        near_duplicates,
        separate,
        held_out_items(prior.samples, [plain] if prior_scan else fittings),
        trained,
        prior_scan,
        prior.trained,
        sets,
        remembered,
        run_captions_of(job, items, rules, remembered),
    )


def _read_set(read: Callable[..., Scan], each: ResolvedSet) -> Scan:
    """The scan of a set, with a note if the number in the name of its folder is not used."""
    scan = read(
        each.path,
        split=each.split,
        revision=each.revision,
        image_column=each.image_column,
        caption_column=each.caption_column,
        box_column=each.crop_column if each.crop == "box" else None,
        masks=each.masks,
        key=each.key("path"),
        caption_source=each.captions.source,
        allow_empty=each.captions.allow_empty,
    )
    folder = os.path.basename(os.path.abspath(each.path))
    if (repeats := repeats_of(f"{folder}/image")[1]) > 1 and not scan.is_table and each.repeats is None:
        # As with kohya's scripts, what counts are the names of the folders below.
        hint = f"give the folder above it for {repeats} repeats"
        hint += "" if each.place == "data" else f", or set {each.key('repeats')}"
        scan.notes.insert(
            0, f"{folder}: the number in its name is not used, because it is {each.key('path')} itself: {hint}"
        )
    return scan


def _require_effect(
    config: TrainingConfig,
    sets: Sequence[ResolvedSet],
    scans: Sequence[Scan],
    separate: Scan | None,
    prior: Scan | None,
) -> None:
    """UserError if a setting is for HF datasets, and the images are in folders. `effects.py` has what a config alone tells.

    `scans` are those of the sets, `separate` and `prior` those of the other folders.
    """
    defaults, data = default_values(type(config)), config.data
    given: dict[str, tuple[Any, list[Scan]]] = {}
    every = [*scans, *(scan for scan in (separate, prior) if scan)]
    for name in ("split", "image_column"):
        given[f"data.{name}"] = (getattr(data, name), every)
        for entry, each, scan in zip(data.sets, sets, scans, strict=bool(data.sets)):
            if getattr(entry, name) is not None:
                given[each.key(name)] = (getattr(each, name), [scan])
    if separate:
        given["evaluation.split"] = config.evaluation.split, [separate]
    for key, (value, of) in given.items():
        default = defaults.get(key, defaults.get(f"data.{key.rpartition('.')[2]}"))
        if value != default and not any(scan.is_table for scan in of):
            sources = " and ".join(scan.source for scan in of)
            raise UserError(
                f"{key} is {value}, which has no effect: {sources} holds image files, and only HF datasets have splits and "
                f"columns; remove {key}, or set it to {show(default)}."
            )
