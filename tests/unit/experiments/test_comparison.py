"""Runs compared: what is planted is found, what is not there is not, and what cannot be compared says why."""

from types import SimpleNamespace

import numpy as np
import pytest
from fake_runs import IMAGES, NOISE_SAMPLES, FakeValidationSet, base_loss, fake_run

from sushi_research.errors import UserError
from sushi_research.experiments import page_content
from sushi_research.experiments.comparison import compare
from sushi_research.experiments.pairs import removed_by_seeds
from sushi_research.experiments.variants import variants_of
from sushi_research.reports import statistics
from sushi_research.reports.outcome_tests import values_of
from sushi_research.reports.run_record import read_record


@pytest.fixture(autouse=True)
def fewer_resamples(monkeypatch):
    """Enough for p-values of a few per cent, in a tenth of the time."""
    monkeypatch.setattr(statistics, "RESAMPLES", 9_999)
    monkeypatch.setattr(statistics, "MAX_PAIRS", 500)


def records(*folders):
    return [read_record(folder) for folder in folders]


def outcomes(pairs):
    return {(pair.candidate.label, pair.reference.label): pair.word for pair in pairs}


def results(comparison):
    return {(pair.candidate.label, pair.reference.label): result.word for pair, result in comparison.decided}


def learned(gain):
    """What is planted with a gain, by the mean over images."""
    base = base_loss(FakeValidationSet())[:, -2:]
    return float(np.log((base - gain) / base).mean())


def test_a_planted_difference_is_found_and_mirrored(tmp_path):
    runs = records(fake_run(tmp_path / "weak", 0.03, rank=2), fake_run(tmp_path / "strong", 0.05, rank=8, noise_seed=5))
    found = compare(runs)
    assert results(found) == {("strong", "weak"): "better"} and outcomes(found.learned) == {("strong", "weak"): "lower"}
    assert results(compare(runs[::-1])) == {("weak", "strong"): "worse"}
    difference, planted = found.learned[0].outcome.difference, learned(0.05) - learned(0.03)
    assert difference.value == pytest.approx(planted, abs=0.005) and difference.images == IMAGES
    assert difference.low <= planted <= difference.high
    assert found.learned[0].mean_losses[1] - found.learned[0].mean_losses[0] == pytest.approx(-0.02, abs=0.002)
    assert found.learned[0].at == 20 * 4 and found.seconds[0].at == pytest.approx(20 * 4 / 8)
    assert found.differing == {"lora.rank": [2, 8]} and found.warnings == [] and found.problems == []


def test_without_a_difference_none_is_found(tmp_path):
    runs = [fake_run(tmp_path / f"r{rank}", 0.05, rank=rank, noise_seed=rank) for rank in range(2, 6)]
    found = compare(records(*runs))
    assert set(results(found).values()) == {"not distinguishable"} and len(found.learned) == 6
    # What was learned and what was kept of 6 pairs are one family.
    assert all(pair.outcome.difference.pairs == 12 for pair in found.learned)


def test_against_a_reference_there_are_fewer_pairs(tmp_path):
    runs = records(*(fake_run(tmp_path / f"r{rank}", 0.05, rank=rank, noise_seed=rank) for rank in range(2, 6)))
    found = compare(runs, "r3")
    assert [(p.candidate.label, p.reference.label) for p in found.learned] == [("r2", "r3"), ("r4", "r3"), ("r5", "r3")]
    assert all(pair.outcome.difference.pairs == 6 for pair in found.learned)
    with pytest.raises(UserError, match="no variant is called r9: choose from r2, r3, r4, r5"):
        compare(runs, "r9")


def test_equal_losses_are_called_identical(tmp_path):
    found = compare(records(fake_run(tmp_path / "a", rank=1), fake_run(tmp_path / "b", rank=2)))
    [(pair, result)] = found.decided
    assert pair.identical and pair.word == result.word == "identical"
    assert result.sentence == "b and a are identical on every one of 12 x 8 losses: bit for bit the same."


def test_seeds_are_pooled_and_paired(tmp_path):
    """The effect of a seed is shared by both variants: pairing by seed removes most of the variance between runs."""
    folders = []
    for rank, gain in ((2, 0.03), (8, 0.033)):
        for seed, effect in enumerate((0.01, -0.01, 0.004)):
            place = tmp_path / f"rank-{rank}-seed{seed}"
            folders.append(fake_run(place, gain + effect, seed=seed, rank=rank, noise_seed=10 * rank + seed))
    found = compare(records(*folders))
    assert [(variant.label, variant.seeds) for variant in found.variants] == [
        ("rank-2", (0, 1, 2)),
        ("rank-8", (0, 1, 2)),
    ]
    [pair] = found.learned
    assert pair.same_seeds and pair.shape == (3, IMAGES, NOISE_SAMPLES)
    assert pair.outcome.difference.seeds == (3, 3) and pair.outcome.difference.scope == "both variants, any seed"
    assert removed_by_seeds(pair) > 0.95

    other = fake_run(tmp_path / "other-seed7", 0.03, seed=7, rank=4)
    unpaired = compare(records(*folders, other))
    assert {pair.same_seeds for pair in unpaired.learned if "other" in pair.candidate.label} == {False}
    assert all(removed_by_seeds(pair) is None for pair in unpaired.learned if "other" in pair.candidate.label)


def test_runs_of_one_variant_are_compared_by_themselves(tmp_path):
    runs = records(*(fake_run(tmp_path / f"r-seed{seed}", 0.05, seed=seed) for seed in range(3)))
    variants, by_run = variants_of(runs)
    assert by_run and [variant.label for variant in variants] == ["r-seed0", "r-seed1", "r-seed2"]
    assert compare(runs).differing == {"train.seed": ["0", "1", "2"]}


def test_names_that_are_alike_are_distinguished(tmp_path):
    runs = records(fake_run(tmp_path / "one/run", rank=1), fake_run(tmp_path / "two/run", rank=2))
    assert [variant.label for variant in variants_of(runs)[0]] == ["one/run", "two/run"]


def test_runs_of_other_lengths_meet_at_the_last_common_point(tmp_path):
    """At 80 samples the long run is half-way: its loss is interpolated between its evaluations."""
    short = fake_run(tmp_path / "short", 0.02, rank=1)
    long = fake_run(tmp_path / "long", 0.06, rank=2, steps=(0, 15, 40), noise_seed=0, rate=16.0)
    found = compare(records(short, long))
    [pair], [by_time] = found.learned, found.seconds
    steps = [read_record(long).evaluation.steps.index(step) for step in (15, 40)]
    of_long = values_of("evaluation", read_record(long).evaluation)[steps].mean((1, 2))
    planted = (of_long * [20 / 25, 5 / 25]).sum() - learned(0.02)
    assert pair.at == 80 and pair.outcome.difference.value == pytest.approx(planted, abs=5e-3)
    # It is twice as fast: in the short one's 10 seconds it has seen all its 160 samples.
    planted = learned(0.06) - learned(0.02)
    assert by_time.at == pytest.approx(10) and by_time.outcome.difference.value == pytest.approx(planted, abs=5e-3)


def test_what_cannot_be_paired_says_why(tmp_path):
    one = fake_run(tmp_path / "one", rank=1)
    elsewhere = fake_run(tmp_path / "elsewhere", rank=2, val_set=FakeValidationSet(hash="another"))
    few = [
        fake_run(tmp_path / f"few{rank}", rank=rank, val_set=FakeValidationSet(names=tuple("abcdefg"), hash="few"))
        for rank in (3, 4)
    ]
    bare = fake_run(tmp_path / "bare", rank=5)
    (bare / "evaluation.parquet").unlink()
    found = compare(records(one, elsewhere, *few, bare))
    by_pair = outcomes(found.learned)
    assert by_pair["elsewhere", "one"] == "they were measured on different validation sets"
    assert by_pair["few4", "few3"] == "7 held-out images are too few for a test result, which needs 8"
    assert by_pair["bare", "one"] == "a run has no evaluation"
    assert any("not all runs have the same validation set" in warning for warning in found.warnings)
    assert any("bare has no evaluation: train with --evaluation.held_out" in problem for problem in found.problems)


def test_a_measured_file_is_compared_with_the_last_evaluations(tmp_path):
    run = fake_run(tmp_path / "run", 0.05)
    file = fake_run(tmp_path / "file", 0.03, noise_seed=3)
    for name in ("run.json", "metrics.jsonl", "plan.json", "config.yaml"):
        (file / name).unlink()
    found = compare(records(run, file))
    assert results(found) == {("file", "run"): "worse"}
    assert outcomes(found.seconds) == {("file", "run"): "an adapter file has no training time"}
    assert found.variants[1].is_file and found.differing == {}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"code": {"commit": "d" * 40, "dirty": False}},
            "not all runs have the same code (cccccccccccc: one; dddddddddddd: two)",
        ),
        ({"code": {"commit": "c" * 40, "dirty": True}}, "uncommitted changes in two"),
        ({"base": {"unet": "other"}}, "not all runs have the same base"),
        ({"libraries": {"torch": "3"}}, "not all runs have the same torch"),
        ({"device": "a GPU"}, "not all runs have the same device"),
        ({"precision": "bf16"}, "not all runs have the same precision"),
        ({"world": 2}, "not all runs have the same number of processes"),
    ],
)
def test_what_makes_runs_less_comparable_is_said(tmp_path, changes, words):
    found = compare(records(fake_run(tmp_path / "one", rank=1), fake_run(tmp_path / "two", rank=2, entry=changes)))
    assert any(words in warning for warning in found.warnings), found.warnings


def test_losses_that_are_not_finite_are_skipped(tmp_path):
    good, bad = fake_run(tmp_path / "good", rank=1), fake_run(tmp_path / "bad", float("nan"), rank=2)
    found = compare(records(good, bad))
    assert outcomes(found.learned) == {("bad", "good"): "a run has no evaluation"}
    assert any("bad/evaluation.parquet has values that are not finite at step" in problem for problem in found.problems)


def test_nothing_to_compare_is_an_error():
    with pytest.raises(UserError, match="there is no run to compare"):
        compare([])


def test_the_drift_is_a_family_of_its_own(tmp_path):
    from sushi_research.evaluation.results import Results

    captions = FakeValidationSet(
        names=tuple(f"caption {number}" for number in range(10)), noise_samples=4, hash="drift"
    )
    for rank, level in ((1, 0.01), (2, 0.03)):
        folder = fake_run(tmp_path / f"r{rank}", rank=rank, noise_seed=rank)
        rng = np.random.default_rng(rank)
        moved = level * (1 + 0.1 * rng.random((10, 4)))
        Results(folder / "drift.parquet").append(captions, 20, moved, np.zeros((10, 4)))
    found = compare(records(tmp_path / "r1", tmp_path / "r2"))
    assert outcomes(found.drift) == {("r2", "r1"): "higher"}
    assert results(found) == {("r2", "r1"): "not distinguishable"}


def test_too_many_pairs_are_reported_and_not_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("sushi_research.experiments.pairs.MAX_PAIRS", 4)
    runs = records(*(fake_run(tmp_path / f"r{rank}", rank=rank, noise_seed=rank) for rank in range(3)))
    notes = {pair.note for pair in compare(runs).learned}
    assert notes == {"6 tests are too many: name one variant with --reference"}
    assert all(pair.outcome is not None for pair in compare(runs, "r0").learned)


def test_files_with_another_order_of_images_pair(tmp_path):
    """The same results with the rows of one run reversed give the same test result."""
    import pyarrow.parquet

    runs = [
        fake_run(tmp_path / name, gain, rank=rank) for rank, (name, gain) in enumerate({"a": 0.03, "b": 0.05}.items())
    ]
    [once] = compare(records(*runs)).learned
    path = runs[1] / "evaluation.parquet"
    table = pyarrow.parquet.ParquetFile(path).read()
    pyarrow.parquet.write_table(table.take(list(range(table.num_rows))[::-1]), path)
    found = compare(records(*runs))
    assert found.learned[0].outcome == once.outcome and found.problems == []
    # Equal numbers of other images under one hash are not paired.
    pyarrow.parquet.write_table(
        table.set_column(1, "image", [[f"other{name}" for name in table["image"].to_pylist()]]), path
    )
    assert "their files differ in images" in compare(records(*runs)).learned[0].note


@pytest.mark.parametrize(
    ("slow", "fast", "expected"),
    [
        # Equal CPU time; the wall clock of one was doubled by other load.
        ({"rate": 4.0, "times": {"cpu_seconds": 0.4}}, {"rate": 8.0, "times": {"cpu_seconds": 0.4}}, ("CPU time", 8.0)),
        ({"rate": 4.0, "times": {"gpu_seconds": 0.2}}, {"rate": 8.0, "times": {"gpu_seconds": 0.4}}, ("GPU time", 4.0)),
        ({"rate": 4.0}, {"rate": 8.0}, ("wall clock", 10.0)),
        (
            {"times": {"gpu_seconds": 0.2}},
            {"times": {"cpu_seconds": 0.2}},
            "by different clocks (CPU time and GPU time)",
        ),
        ({"times": {"cpu_seconds": 0.2}}, {}, "by different clocks (CPU time and wall clock)"),
    ],
)
def test_time_is_that_of_one_clock(tmp_path, slow, fast, expected):
    one, two = fake_run(tmp_path / "one", 0.03, rank=1, **slow), fake_run(tmp_path / "two", 0.05, rank=2, **fast)
    [pair] = compare(records(one, two)).seconds
    if isinstance(expected, str):
        assert pair.outcome is None and expected in pair.note
        return
    assert (pair.clock, pair.at) == (expected[0], pytest.approx(expected[1])) and pair.outcome is not None
    # At equal CPU time the reference took 20 seconds by the wall clock, the candidate 10.
    if pair.clock == "CPU time":
        assert pair.wall_seconds == (pytest.approx(20), pytest.approx(10))


def test_a_drift_that_was_not_measured_at_the_end_is_not_compared(tmp_path):
    from sushi_research.evaluation.results import Results

    captions = FakeValidationSet(names=tuple(f"caption {number}" for number in range(10)), noise_samples=4, hash="d")
    for rank, step in ((1, 20), (2, 10)):
        folder = fake_run(tmp_path / f"r{rank}", rank=rank, noise_seed=rank)
        Results(folder / "drift.parquet").append(captions, step, np.full((10, 4), rank), np.zeros((10, 4)))
    found = compare(records(tmp_path / "r1", tmp_path / "r2"))
    assert outcomes(found.drift) == {("r2", "r1"): "r2 has no drift at its last evaluation, only at step 10"}


def test_the_evaluation_of_a_file_that_is_called_like_its_run_is_told_from_it(tmp_path):
    other = FakeValidationSet(hash="another set")
    folders = [fake_run(tmp_path / "runs/mine"), fake_run(tmp_path / "evaluations/mine", val_set=other)]
    for name in ("run.json", "metrics.jsonl", "plan.json", "config.yaml"):
        (folders[1] / name).unlink()
    found = compare([read_record(folder) for folder in folders], reference="mine")
    assert [variant.label for variant in found.variants] == ["mine", "evaluations/mine"]
    assert any("set-hash: mine; another set: evaluations/mine)" in warning for warning in found.warnings), (
        found.warnings
    )


def test_what_is_not_known_about_an_adapter_file_is_said(tmp_path):
    for number, facts in enumerate(({"validation_images_unseen": True}, {"validation_images_unseen": False}, {}, None)):
        folder = fake_run(tmp_path / f"file{number}", noise_seed=number, entry={"adapter": facts})
        (folder / "run.json").unlink()
    found = compare(records(*(tmp_path / f"file{number}" for number in range(4))))
    [warning] = [warning for warning in found.warnings if "trained on the validation images" in warning]
    assert warning.startswith("it is not known whether file1, file2 was trained on")


def test_the_place_of_the_same_data_does_not_make_a_variant(tmp_path):
    records = [read_record(fake_run(tmp_path / f"a-seed{seed}", seed=seed)) for seed in range(3)]
    for record, path, content in zip(records, ("photos", "/mnt/photos", "photos"), ("1", "1", "2"), strict=True):
        record.identity |= {"data.path": path, "facts.data": content}
    assert [variant.seeds for variant in variants_of(records)[0]] == [(0, 1), (2,)]
    del records[1].identity["facts.data"]
    assert len(variants_of(records)[0]) == 3, "without the hash, nothing says that it is the same"


def test_the_pages_of_runs_are_linked_whatever_they_are_called(tmp_path):
    """A name that is not valid Unicode is quoted byte by byte, and one with a colon is no other scheme."""
    names = ["a b", "javascript:alert(1)", "x\udcff"]
    for name in [*names, "without a page"]:
        (tmp_path / "runs" / name).mkdir(parents=True)
    for name in names:
        (tmp_path / "runs" / name / "report.html").touch()
    runs = [SimpleNamespace(name=path.name, path=path) for path in sorted((tmp_path / "runs").iterdir())]
    comparison = SimpleNamespace(variants=[SimpleNamespace(label="rank 8", runs=runs)])
    assert [(each.text, each.address) for each in page_content.run_pages(comparison, tmp_path / "page")] == [
        ("rank 8: a b", "../runs/a%20b/report.html"),
        ("rank 8: javascript:alert(1)", "../runs/javascript%3Aalert%281%29/report.html"),
        ("rank 8: x\udcff", "../runs/x%FF/report.html"),
    ]
