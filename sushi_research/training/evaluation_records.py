"""What a continued run keeps of its earlier evaluations: only results of the validation set and the drift set that it uses now.

The two are independent. Each result file carries the hash of its set. metrics.jsonl carries no hash, so it keeps the means of
exactly those steps that the files hold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sushi_research.errors import UserError
from sushi_research.evaluation.drift import DriftSet
from sushi_research.evaluation.results import Measured, Results
from sushi_research.evaluation.validation_set import ValidationSet
from sushi_research.runs import records
from sushi_research.runs.metrics_file import MetricsFile
from sushi_research.runs.run_folder import RunFolder


@dataclass(frozen=True)
class Kept:
    """One kind of results of a run: its file, the set that the run is evaluated on now (None: not evaluated), and its metrics.

    `prefix` is that of its keys in metrics.jsonl; `what` names the results in messages.
    """

    results: Results
    measured: Measured | None
    prefix: str
    what: str
    reason: Callable[[], str]

    @property
    def is_of_another(self) -> bool:
        """Whether the stored results belong to another set than the run uses now."""
        return self.measured is not None and self.results.is_of_another(self.measured)


def of_run(run: RunFolder, val_set: ValidationSet | None, drift_set: DriftSet | None) -> list[Kept]:
    """Both kinds of results of a run."""
    losses, drift = Results(run.evaluation), Results(run.drift)
    return [
        Kept(losses, val_set, "evaluation/loss", "validation losses", lambda: _validation_change(run, losses, val_set)),
        Kept(drift, drift_set, "evaluation/drift", "drift values", lambda: _drift_change(drift, drift_set)),
    ]


def changes(run: RunFolder, val_set: ValidationSet | None, drift_set: DriftSet | None, is_finished: bool) -> list[str]:
    """A sentence for each kind of results that belongs to another set than the run is evaluated on now.

    UserError if a result file is damaged; a sentence instead if the run is finished, because it is not evaluated again.
    """
    found = []
    for kind in of_run(run, val_set, drift_set):
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


def cut_back(run: RunFolder, val_set: ValidationSet | None, drift_set: DriftSet | None, step: int) -> None:
    """Drops metrics and results after `step`, from which the run continues (-1: all), and all results of another set."""
    kinds = of_run(run, val_set, drift_set)
    for kind in kinds:
        kind.results.cut_back(-1 if step < 0 or kind.is_of_another else step)
    MetricsFile(run.metrics).cut_back(step, evaluated={kind.prefix: kind.results.steps() for kind in kinds})


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
