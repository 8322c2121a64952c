"""What a continued run keeps of its earlier evaluations: only results of the sets that it is measured on now.

The kinds of results are independent. Each result file carries the hash of its set. metrics.jsonl carries no hash, so it keeps the
means of exactly those steps that the files hold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sushi_research.errors import UserError
from sushi_research.evaluation.drift import DriftSet
from sushi_research.evaluation.measured_sets import MeasuredSets
from sushi_research.evaluation.pictures import PictureSet, rows_of
from sushi_research.evaluation.results import Measured, Results
from sushi_research.evaluation.validation_set import ValidationSet
from sushi_research.files import remove
from sushi_research.runs import records
from sushi_research.runs.metrics_file import MetricsFile
from sushi_research.runs.run_folder import RunFolder
from sushi_research.sampling import plots
from sushi_research.sampling.sample_grids import step_folder


@dataclass(frozen=True)
class Kind:
    """One kind of results of a run: its file, the set that the run is measured on now (None: not measured), and its metrics.

    `prefixes` are those of its keys in metrics.jsonl; `what` names the results in messages, and `reason` says what distinguishes
    the set from that of the stored results. `is_implied`: whether a run is measured on it without being asked to, so a run of an
    older version lacks it.
    """

    results: Results
    measured: Measured | None
    prefixes: tuple[str, ...]
    what: str
    reason: Callable[[], str]
    is_implied: bool = False

    @property
    def is_of_another(self) -> bool:
        """Whether the stored results belong to another set than the run uses now."""
        return self.measured is not None and self.results.is_of_another(self.measured)


def of_run(run: RunFolder, sets: MeasuredSets) -> dict[str, Kind]:
    """All kinds of results of a run, by their set's name in `MeasuredSets`. `sets` says which are measured now."""
    results = {name: Results(path) for name, path in run.results.items()}
    # The memorised metrics compare the training images with the held-out ones.
    of_losses = ("evaluation/loss", "evaluation/log_loss", "evaluation/learned", "evaluation/memorised")
    kinds = [
        (
            "validation",
            of_losses,
            "validation losses",
            lambda: _validation_change(run, results["validation"], sets.validation),
        ),
        ("drift", ("evaluation/drift",), "drift values", lambda: _drift_change(results["drift"], sets.drift)),
        (
            "base_images",
            ("evaluation/kept",),
            "losses on the base's images",
            lambda: _drift_change(results["base_images"], sets.base_images),
        ),
        (
            "prior",
            ("evaluation/prior",),
            "losses on prior images",
            lambda: "the prior images or evaluation.noise_samples have changed",
        ),
        (
            "trained",
            ("evaluation/trained", "evaluation/memorised"),
            "losses on training images",
            lambda: "the training images that are measured or evaluation.noise_samples have changed",
        ),
        (
            "pictures_learned",
            ("evaluation/pictures_learned",),
            "pictures of held-out captions",
            lambda: "the pictures of held-out captions are drawn otherwise",
        ),
        (
            "pictures_kept",
            ("evaluation/pictures_kept",),
            "pictures of neutral captions",
            lambda: "the pictures of neutral captions are drawn otherwise",
        ),
    ]
    implied = ("base_images", "trained")
    return {
        name: Kind(results[name], getattr(sets, name), prefixes, what, reason, name in implied)
        for name, prefixes, what, reason in kinds
    }


def changes(run: RunFolder, sets: MeasuredSets, is_finished: bool) -> list[str]:
    """A sentence for each kind of results that belongs to another set than the run is measured on now.

    UserError if a result file is damaged; a sentence instead if the run is finished, because it is not evaluated again.
    """
    found = []
    for kind in of_run(run, sets).values():
        try:
            kind.results.steps()  # a UserError if the rows are not those of complete steps
            if kind.is_of_another:
                outcome = (
                    ", but the run is finished: its {} stay as they are" if is_finished else ": earlier {} are dropped"
                )
                found.append(kind.reason() + outcome.format(kind.what))
        except UserError as error:
            if not is_finished:
                raise
            found.append(str(error))
    return found


def cut_back(run: RunFolder, sets: MeasuredSets, step: int) -> None:
    """Drops metrics and results after `step`, from which the run continues (-1: all), and all results of another set."""
    evaluated: dict[str, set[int]] = {}
    for kind in of_run(run, sets).values():
        if kind.is_of_another and isinstance(kind.measured, PictureSet):
            for path in run.pictures.glob(f"step-*/*-{kind.measured.kind}-*.png"):
                remove(path)
        kind.results.cut_back(-1 if step < 0 or kind.is_of_another else step)
        steps = set(kind.results.steps())
        for prefix in kind.prefixes:
            evaluated[prefix] = evaluated.get(prefix, steps) & steps
    MetricsFile(run.metrics).cut_back(step, evaluated=evaluated)


def lost(run: RunFolder, sets: MeasuredSets, step: int) -> dict[Path, str]:
    """path -> a sentence, for each kind that is measured now and lost results or images of `step`, the end of a finished run.

    Damaged results are not among them, nor those that were never measured because the run is of an older version.
    """
    found = {}
    for kind in of_run(run, sets).values():
        path = kind.results.path
        try:
            if kind.measured is None or kind.is_of_another:
                continue
            if step in kind.results.steps():
                found |= _lost_images(run, kind.measured, step)
                continue
            if kind.is_implied and not path.exists() and not _is_logged(run, kind.prefixes[0]):
                continue
            found[path] = f"{path} has no results of step {step}" if path.exists() else f"{path} is missing"
        except UserError:
            pass  # `changes` says it
    return found


def _lost_images(run: RunFolder, measured: Measured, step: int) -> dict[Path, str]:
    """path -> a sentence, for each image of a picture set that is missing or damaged."""
    rows = rows_of([measured]) if isinstance(measured, PictureSet) else []
    paths = [step_folder(run.pictures, step) / name for name, _ in rows]
    return {path: f"{path} {problem}" for path in paths if (problem := plots.picture_problem(path))}


def _is_logged(run: RunFolder, prefix: str) -> bool:
    return any(key.startswith(prefix) for line in MetricsFile(run.metrics).read() for key in line)


def _validation_change(run: RunFolder, results: Results, val_set: ValidationSet | None) -> str:
    """What distinguishes the validation set of the stored results, as far as validation_set.json describes it."""
    assert val_set is not None
    try:
        was = records.read_as(run.validation_set, records.ValidationSetRecord, "")
        described = was["hash"] == results.set_hash()
        before, now = _facts(was), _facts(val_set.describe())
    except UserError:
        described = False
    if not described:
        return "the validation set has changed"
    found = []
    if before["images"] != now["images"]:
        found.append("the held-out images have changed")
    elif before["captions"] != now["captions"]:
        found.append("the captions of the held-out images have changed")
    if before["noise_samples"] != now["noise_samples"]:
        found.append(f"evaluation.noise_samples was {before['noise_samples']} and is {now['noise_samples']}")
    return " and ".join(found) or "the validation set has changed"


def _facts(described: dict[str, Any]) -> dict[str, Any]:
    pairs = [(image["hash"], image["caption"]) for image in described["images"]]
    return {
        "images": {image for image, _ in pairs},
        "captions": set(pairs),
        "noise_samples": described["noise_samples"],
    }


def _drift_change(results: Results, drift_set: DriftSet | None) -> str:
    """What distinguishes the drift set of the stored results, which hold the captions."""
    assert drift_set is not None
    arrays = results.arrays()
    if arrays is not None and set(arrays.names) != set(drift_set.names):
        return "the captions for the drift have changed"
    return "the drift set has changed"
