"""A continued run keeps the results of its present validation set and drift set, each for itself, and says what it drops."""

import json
from dataclasses import dataclass, replace

import numpy as np
import pytest
from fake_runs import FakeValidationSet
from PIL import Image

from sushi_research.evaluation.measured_sets import MeasuredSets
from sushi_research.evaluation.pictures import Picture, PictureSet, rows_of
from sushi_research.evaluation.results import Results
from sushi_research.runs.metrics_file import MetricsFile
from sushi_research.runs.run_folder import RunFolder
from sushi_research.training import evaluation_records


@dataclass(frozen=True)
class ValidationSet(FakeValidationSet):
    """Two images with a caption each."""

    names: tuple[str, ...] = ("image0", "image1")
    noise_samples: int = 4
    captions: tuple[str, ...] = ("a", "b")

    def describe(self):
        images = [{"hash": name, "caption": text} for name, text in zip(self.names, self.captions, strict=True)]
        return {"hash": self.hash, "noise_samples": self.noise_samples, "images": images}


VALIDATION, DRIFT = ValidationSet(), FakeValidationSet(names=("a cat", "a dog"), noise_samples=4, hash="drift")
OTHER, OTHER_DRIFT = replace(VALIDATION, hash="other"), replace(DRIFT, hash="other")
LOSSES, DRIFTS = "earlier validation losses are dropped", "earlier drift values are dropped"


@pytest.fixture
def run(tmp_path):
    found = RunFolder(tmp_path, None)
    found.validation_set.write_text(json.dumps(VALIDATION.describe()))
    means = {"evaluation/loss": 1.0, "evaluation/loss_over_base": 0.0, "evaluation/drift": 1.0}
    for step in (0, 2, 4):
        for path, measured in ((found.evaluation, VALIDATION), (found.drift, DRIFT)):
            Results(path).append(measured, step, np.ones((2, 4)), np.ones((2, 4)))
        MetricsFile(found.metrics).append({"step": step} | means)
    return found


def kept(run):
    """Steps of the losses, of their means in metrics.jsonl, of the drift, of its means."""
    lines, keys = MetricsFile(run.metrics).read(), ("evaluation/loss_over_base", "evaluation/drift")
    loss, drift = ([line["step"] for line in lines if key in line] for key in keys)
    return Results(run.evaluation).steps(), loss, Results(run.drift).steps(), drift


@pytest.mark.parametrize(
    ("val_set", "drift_set", "said", "losses", "drift"),
    [
        (VALIDATION, DRIFT, [], [0, 2], [0, 2]),
        # Switched off: what was measured stays.
        (None, None, [], [0, 2], [0, 2]),
        (VALIDATION, None, [], [0, 2], [0, 2]),
        (VALIDATION, replace(OTHER_DRIFT, names=("x",)), [f"the captions for the drift have changed: {DRIFTS}"], [0, 2], []),
        (VALIDATION, OTHER_DRIFT, [f"the drift set has changed: {DRIFTS}"], [0, 2], []),
        (replace(OTHER, noise_samples=8), DRIFT, [f"evaluation.noise_samples was 4 and is 8: {LOSSES}"], [], [0, 2]),
        (replace(OTHER, names=("image0", "x")), None, [f"the held-out images have changed: {LOSSES}"], [], [0, 2]),
        (replace(OTHER, captions=("a", "x")), DRIFT, [f"the captions of the held-out images have changed: {LOSSES}"], [], [0, 2]),
        (OTHER, OTHER_DRIFT, [f"the validation set has changed: {LOSSES}", f"the drift set has changed: {DRIFTS}"], [], []),
    ],
)  # fmt: skip
def test_what_is_of_another_set_is_dropped_and_nothing_else(run, val_set, drift_set, said, losses, drift):
    sets = MeasuredSets(val_set, drift_set)
    assert evaluation_records.changes(run, sets, is_finished=False) == said
    finished = evaluation_records.changes(run, sets, is_finished=True)
    assert len(finished) == len(said) and all("the run is finished" in sentence for sentence in finished)
    evaluation_records.cut_back(run, sets, 2)
    assert kept(run) == (losses, losses, drift, drift)


def test_means_of_results_that_were_removed_are_dropped(run):
    run.evaluation.unlink()
    evaluation_records.cut_back(run, MeasuredSets(OTHER, DRIFT), 4)
    assert kept(run) == ([], [], [0, 2, 4], [0, 2, 4])
    evaluation_records.cut_back(run, MeasuredSets(VALIDATION, DRIFT), -1)
    assert kept(run) == ([], [], [], []) and run.metrics.read_bytes() == b""


def test_memorised_needs_the_losses_on_training_and_on_held_out_images(run):
    sets = MeasuredSets(VALIDATION, DRIFT, trained=replace(VALIDATION, hash="trained"))
    for step in (0, 2, 4):
        Results(run.results["trained"]).append(sets.trained, step, np.ones((2, 4)), np.ones((2, 4)))
    lines = MetricsFile(run.metrics).read()
    run.metrics.unlink()
    for line in lines:
        MetricsFile(run.metrics).append(line | {"evaluation/trained": 0.0, "evaluation/memorised_auc": 0.5})
    changed = replace(sets, trained=replace(sets.trained, hash="other"))
    [dropped] = evaluation_records.changes(run, changed, is_finished=False)
    assert dropped.startswith("the training images that are measured ") and dropped.endswith(
        "training images are dropped"
    )
    evaluation_records.cut_back(run, changed, 4)
    keys = {key for line in MetricsFile(run.metrics).read() for key in line}
    assert keys == {"step", "evaluation/loss", "evaluation/loss_over_base", "evaluation/drift"}
    assert not run.results["trained"].exists() and Results(run.evaluation).steps() == [0, 2, 4]


def test_a_finished_run_has_lost_what_it_logged_and_not_what_older_versions_did_not_measure(run):
    sets = MeasuredSets(VALIDATION, DRIFT, base_images=DRIFT, prior=replace(VALIDATION, hash="prior"))
    assert evaluation_records.lost(run, sets, 4) == {run.results["prior"]: f"{run.results['prior']} is missing"}
    MetricsFile(run.metrics).append({"step": 4, "evaluation/kept": 0.0})
    assert evaluation_records.lost(run, sets, 4).keys() == {run.results["prior"], run.results["base_images"]}
    run.drift.unlink()
    assert run.drift in evaluation_records.lost(run, sets, 4)


def test_images_of_another_set_of_pictures_go_with_its_results_and_lost_ones_are_named(run):
    learned, kept = (
        PictureSet(kind, (Picture("a cat", 64, 64, "key"), Picture("a dog", 64, 64, "key")), kind)
        for kind in ("learned", "kept")
    )
    sets = MeasuredSets(VALIDATION, pictures_learned=learned, pictures_kept=kept)
    for each in (learned, kept):
        for step in (0, 4):
            Results(run.results[each.name]).append(each, step, np.ones((2, 1)), np.ones((2, 1)))
            for name, _ in rows_of([each]):
                path = run.pictures / f"step-{step:08d}" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (8, 8)).save(path)
    assert evaluation_records.lost(run, sets, 4) == {}
    lost = run.pictures / "step-00000004/01-kept-seed0.png"
    lost.write_bytes(lost.read_bytes()[:-20])
    assert evaluation_records.lost(run, sets, 4) == {lost: f"{lost} is damaged"}
    changed = replace(sets, pictures_kept=replace(kept, hash="other"))
    [said] = evaluation_records.changes(run, changed, is_finished=False)
    assert said.endswith(": earlier pictures of neutral captions are dropped")
    evaluation_records.cut_back(run, changed, 4)
    assert sorted(path.name for path in run.pictures.rglob("*.png")) == sorted(
        name for name, _ in rows_of([learned]) * 2
    )
    assert Results(run.results["pictures_learned"]).steps() == [0, 4] and not run.results["pictures_kept"].exists()
