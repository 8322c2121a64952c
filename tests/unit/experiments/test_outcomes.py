"""Runs compared by their outcomes: older runs, a fixed step, pictures, scores, and what cannot be tested."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from fake_runs import FakeValidationSet, fake_run
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sushi_research.errors import UserError
from sushi_research.evaluation.results import Results
from sushi_research.experiments import outcome_sections, page_content, picture_grids, plots
from sushi_research.experiments.comparison import compare
from sushi_research.experiments.numbers import numbers
from sushi_research.reports import page, statistics
from sushi_research.reports.run_record import read_record

PROMPTS = tuple(f"prompt {number}" for number in range(10))


@pytest.fixture(autouse=True)
def fewer_resamples(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 999)
    monkeypatch.setattr(statistics, "MAX_PAIRS", 50)


def runs(tmp_path, *, gains=(0.03, 0.05), **settings):
    """Two runs, A and B."""
    folders = [
        fake_run(tmp_path / name, gain, rank=rank, noise_seed=rank, **settings)
        for rank, (name, gain) in enumerate(zip("AB", gains, strict=True))
    ]
    return folders


def compared(*folders, **options):
    return compare([read_record(folder) for folder in folders], **options)


def text(comparison, pictures=None):
    return page.to_markdown(page_content.blocks(comparison, "title", pictures or {}))


def measure(folder, kind, level, names=PROMPTS, hash="set", steps=(0, 10, 20)):
    """Results of one sample per prompt that go to `level` of the base's."""
    measured, base = FakeValidationSet(names, 1, hash), np.full((len(names), 1), 0.5)
    noise = 0.002 * np.random.default_rng(len(folder.name) + steps[-1]).standard_normal(base.shape)
    for step in steps:
        share = step / steps[-1]
        Results(folder / f"{kind}.parquet").append(measured, step, base * ((1 - share) + share * (level + noise)), base)


def test_of_an_older_run_what_was_learned_is_compared_and_the_run_is_named(tmp_path):
    old, new = runs(tmp_path)
    (old / "base_images.parquet").unlink()
    found = compared(old, new)
    [(pair, result)] = found.decided
    assert found.problems == [] and result.word == "undecided" and found.learned[0].outcome is not None
    assert "B learned more (log loss" in result.sentence
    assert "what it kept is not known (A has no loss on the base's own pictures)" in result.sentence
    (new / "base_images.parquet").unlink()
    assert "older versions did not measure it" in compared(old, new).decided[0][1].sentence
    assert "B, A have no loss on the base's own pictures" in text(compared(old, new))


def test_runs_are_compared_at_a_step_that_was_fixed_beforehand(tmp_path):
    one, two = runs(tmp_path, gains=(0.03, 0.03))
    other = fake_run(tmp_path / "other", 0.05, rank=3, noise_seed=3, steps=(0, 10, 15))
    found = compared(one, two, other, step=20)
    words = {(pair.candidate.label, pair.reference.label): pair.word for pair in found.learned}
    assert words["B", "A"] == "not distinguishable" and words["other", "A"] == "other has no evaluation at step 20"
    assert found.problems == ["not evaluated at step 20, so without a test result: other"] and found.seconds == []
    assert "## At step 20: learned" in text(found) and "| B - A | step 20 |" in text(found)
    # At step 10 the run that is shorter has gone two thirds of its way.
    learned = {
        (pair.candidate.label, pair.reference.label): pair for pair in compared(one, two, other, step=10).learned
    }
    assert learned["other", "A"].mean_losses[1] - learned["other", "A"].mean_losses[0] == pytest.approx(
        0.03 / 2 - 0.05 * 2 / 3, abs=0.002
    )
    with pytest.raises(
        UserError, match="--step is 7, and no run was evaluated at that step: choose from 0, 10, 15, 20"
    ):
        compared(one, two, other, step=7)


def test_pictures_that_disagree_with_the_losses_are_said_first_and_lead(tmp_path):
    one, two = runs(tmp_path)
    for folder, level in ((one, 0.5), (two, 0.9)):
        measure(folder, "pictures_learned", level)
        measure(folder, "pictures_kept", 0.1)
    found = compared(one, two)
    [(_, result)] = found.decided
    assert result.word == "worse" and "A learned more (log distance from the held-out images" in result.sentence
    written = text(found)
    first = written.index("- Losses and pictures disagree: by the losses B learned more than A (log loss")
    assert first < written.index("## Test result") and "## By pictures: distance from the base's pictures" in written
    [said] = page_content.sentences(found)
    assert said.startswith("Losses and pictures disagree") and "B is worse than A" in said


def test_what_pictures_do_not_share_is_a_sentence(tmp_path):
    one, two = runs(tmp_path)
    measure(one, "pictures_learned", 0.5)
    assert "B - A: B has no pictures of held-out captions" in text(compared(one, two))
    measure(two, "pictures_learned", 0.5, hash="other")
    found = compared(one, two)
    assert "their pictures of held-out captions are of different sets" in text(found)
    assert found.decided[0][1].word == "better", "the losses are compared all the same"
    for folder in (one, two):
        measure(folder, "pictures_kept", 0.5, names=PROMPTS[:5])
        measure(folder, "prior", 0.9, steps=(0, 10))
    found = compared(one, two)
    assert "5 prompts are too few for a test result, which needs 8" in text(found)
    assert "a run has no loss on prior images around 80 samples, where the pair is compared" in text(found)


def test_a_bin_without_noise_samples_is_a_sentence(tmp_path):
    """Of three noise samples at t 166, 500 and 833 none is in bin 0; of two, at 250 and 750, none in 0 and 2."""
    found = compared(*runs(tmp_path / "three", val_set=FakeValidationSet(noise_samples=3)))
    assert found.decided[0][1].word == "better" and "| no noise samples |" in text(found)
    found = compared(*runs(tmp_path / "one", val_set=FakeValidationSet(noise_samples=1)))
    note = "a timestep bin that it uses has no noise samples"
    assert note in found.learned[0].note and found.learned[0].at == 80 and found.learned[0].mean_losses is not None
    assert note in found.decided[0][1].sentence and found.decided[0][1].words["kept"] == "not worse"
    assert not plots.validation_curves(found, tmp_path / "curves.png") and note in text(found)


def test_scores_are_outcomes(tmp_path):
    one, two = runs(tmp_path, gains=(0.03, 0.03))
    for folder, level in ((one, 0.2), (two, 0.8)):
        values = {prompt: level + 0.01 * number for number, prompt in enumerate(PROMPTS)}
        scores = {"concept": {"values": values, "about": "learned"}, "votes": level, "few": {"a": level, "b": level}}
        (folder / "scores.json").write_text(json.dumps(scores))
    found = compared(one, two)
    [(_, result)] = found.decided
    assert result.word == "better" and "it learned more (score concept +0.6, 95 % interval" in result.sentence
    written = text(found)
    assert "| B | 0.845 (10) | 0.8 (2) | 0.8 (1) |" in written
    assert "score votes has 1 unit in common, and a test needs 8: it is only a column" in written
    # The tables have it in its own sign too.
    assert "## By score concept (higher is better)" in written and "| B - A | 80 | +0.6 | +0.6 to +0.6 |" in written
    [tested] = numbers(found)["families"]["score concept"]
    assert tested["outcome"] == "higher" and tested["difference"]["low"] == pytest.approx(0.6)
    # At another point than the end of both runs, a score says nothing.
    longer = fake_run(tmp_path / "longer", 0.03, rank=5, noise_seed=5, steps=(0, 10, 20, 30))
    (longer / "scores.json").write_bytes((two / "scores.json").read_bytes())
    found = compared(one, longer)
    assert "which end at other points than the pair is compared at" in found.outcomes["score concept"][0].note
    (two / "scores.json").write_text("{")
    found = compared(one, two)
    assert "B has no score concept" in text(found) and "scores.json is not valid JSON" in found.problems[0]


def score(folder, values, **options):
    named = dict(zip(PROMPTS, values, strict=False))
    (folder / "scores.json").write_text(json.dumps({"x": {"values": named, **options}}))


@pytest.mark.parametrize("size", [1e69, 1e-39])
def test_scores_of_any_size_are_tested(tmp_path, size):
    one, two = runs(tmp_path)
    for folder, level in ((one, 1), (two, 2)):
        score(folder, [size * (level + 0.01 * number**level) for number in range(10)])
    found = compared(one, two).outcomes["score x"][0]
    assert found.word == "higher" and np.isfinite(found.outcome.difference.smallest_detectable)


def test_scores_that_all_differ_by_the_same_are_not_surer_than_the_sign_test(tmp_path, monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 9_999)
    one, two = runs(tmp_path)
    for folder, level in ((one, 0), (two, 1)):
        score(folder, [level] * 8, about="learned")
    found = compared(one, two).outcomes["score x"][0].outcome
    assert found.difference.p_value == 2.0**-7 and found.adjusted_p == 2 * 2.0**-7


def test_scores_of_runs_that_end_elsewhere_are_not_compared_whatever_they_were_evaluated_on(tmp_path):
    one, two = runs(tmp_path)
    longer = fake_run(tmp_path / "longer", rank=5, steps=(0, 20, 40), val_set=FakeValidationSet(hash="other"))
    for level, folder in enumerate((one, two, longer)):
        score(folder, [level + 0.01 * number**level for number in range(10)])
    found = compared(one, longer)
    assert "different validation sets" in found.learned[0].note and found.outcomes["base_images"][0].at == 80
    assert "which end at other points than the pair is compared at" in found.outcomes["score x"][0].note
    for folder in (one, two):
        (folder / "evaluation.parquet").unlink()
    assert compared(one, two).outcomes["score x"][0].word == "higher"


def test_scores_that_disagree_with_each_other_are_followed_by_no_result(tmp_path):
    one, two = runs(tmp_path)
    for level, folder in enumerate((one, two)):
        values = [
            {prompt: sign * level + 0.01 * number * level for number, prompt in enumerate(PROMPTS)} for sign in (1, -1)
        ]
        found = {name: {"values": each, "about": "learned"} for name, each in zip("xy", values, strict=True)}
        (folder / "scores.json").write_text(json.dumps(found))
    [(_, result)] = compared(one, two).decided
    assert result.word == "undecided" and result.disagreement == ""
    assert "what B learned is withheld, because score x and score y disagree" in result.sentence


def test_the_sign_of_a_score_is_that_of_the_runs_of_the_pair(tmp_path):
    """Other runs may have a score of the same name of which less is better."""
    one, two = runs(tmp_path)
    other = fake_run(tmp_path / "other", rank=9, noise_seed=9)
    for level, (folder, better) in enumerate(((other, "lower"), (one, "higher"), (two, "higher"))):
        score(folder, [level + 0.01 * number**level for number in range(10)], better=better, about="learned")
    results = {
        pair.candidate.label + pair.reference.label: result for pair, result in compared(other, one, two).decided
    }
    assert (
        "B learned more (score x +1.2" in results["BA"].sentence
        or "it learned more (score x +1.2" in results["BA"].sentence
    )


def test_with_many_pairs_reasons_and_disagreements_are_a_few(tmp_path, monkeypatch):
    monkeypatch.setattr("sushi_research.reports.outcome_tests.LEVEL", 1.0)
    folders = [fake_run(tmp_path / f"r{rank}", 0.01 * rank, rank=rank, noise_seed=rank, kept=None) for rank in range(6)]
    for rank, folder in enumerate(folders):
        score(folder, [-rank + 0.01 * number**rank / 9**rank for number in range(10)], about="learned")
    found = compared(*folders)
    assert sum(bool(result.disagreement) for _, result in found.decided) > 8
    [warning] = [block for block in page_content.blocks(found, "title", {}) if block.kind == "warning"]
    assert len(warning.items) == 9 and "more pairs, which are in comparison.json" in warning.items[-1]
    reasons = outcome_sections.family(found.outcomes["base_images"], "Kept")[-1].items
    assert len(reasons) == 11 and reasons[-1] == "5 more reasons are in comparison.json"


def test_what_is_memorised_is_shown_and_decides_nothing(tmp_path):
    one, two = runs(tmp_path, gains=(0.03, 0.03))
    before = compared(one, two).results
    measure(one, "trained", 0.1)
    found = compared(one, two)
    assert found.results == before
    [_, table, _] = outcome_sections.memorised_images(found)
    assert table.rows[1][:4] == ["A", "20", "1.00", "0.82 to 1.00"] and float(table.rows[1][4]) > 2


def test_learned_against_kept_has_a_point_for_each_evaluation(tmp_path):
    one, two = runs(tmp_path, kept=0.02)
    found = plots.trade_off_points(read_record(one))
    assert found[:, 0].tolist() == [0, 10, 20] and found[0, 1:].tolist() == [0, 0, 0, 0]
    assert (np.diff(found[:, 1]) < 0).all() and (np.diff(found[:, 3]) > 0).all()
    assert plots.trade_off(compared(one, two), tmp_path / "trade_off.png")
    for folder in (one, two):
        (folder / "base_images.parquet").unlink()
    assert not plots.trade_off(compared(one, two), tmp_path / "none.png")


@pytest.mark.parametrize("length", [5, 24])
def test_a_legend_of_many_variants_is_within_the_figure(length):
    figure, (axes,) = plots._figure(8.5, 6)
    for number in range(30):
        axes.plot([0, 1], [0, number], label=f"{number:m>{length}}")
    plots._legend(figure, axes, 30)
    figure.canvas.draw()
    [legend], frame = figure.legends, figure.bbox
    extent = legend.get_window_extent()
    assert frame.x0 <= extent.x0 and extent.x1 <= frame.x1


def test_pictures_of_two_runs_are_side_by_side(tmp_path):
    one, two = runs(tmp_path)
    for shade, folder in enumerate((one, two)):
        for number, kind in enumerate(("learned", "kept")):
            place = folder / "pictures/step-00000020"
            place.mkdir(parents=True, exist_ok=True)
            described = PngInfo()
            described.add_text("prompt", PROMPTS[number])
            colour = (80 * shade, 90, 90)
            Image.new("RGB", (16, 16), colour).save(place / f"{number:02d}-{kind}-seed0.png", pnginfo=described)
    found = compared(one, two)
    assert picture_grids.pictures(found, tmp_path / "pictures.png") and not picture_grids.samples(
        found, tmp_path / "s.png"
    )
    with Image.open(tmp_path / "pictures.png") as grid:
        assert {(0, 90, 90), (80, 90, 90)} <= {colour for _, colour in grid.getcolors(1 << 20)}
    assert found.problems == []
    # A variant may have the name of the column of the base's pictures.
    base = one / "pictures/step-00000000"
    base.mkdir()
    for path in (one / "pictures/step-00000020").iterdir():
        with Image.open(path) as image:
            described = PngInfo()
            described.add_text("prompt", image.info["prompt"])
            Image.new("RGB", (16, 16), (160, 90, 90)).save(base / path.name, pnginfo=described)
    found.variants[0] = replace(found.variants[0], label="base")
    assert picture_grids.pictures(found, tmp_path / "base.png")
    with Image.open(tmp_path / "base.png") as grid:
        colours = {colour for _, colour in grid.getcolors(1 << 20)}
    assert {(0, 90, 90), (80, 90, 90), (160, 90, 90)} <= colours
    # What a run from a file draws at step 0 is not the base's; that of another run is.
    shutil.copytree(base, two / "pictures/step-00000000")
    for path in base.iterdir():
        with Image.open(path) as image:
            described = PngInfo()
            described.add_text("prompt", image.info["prompt"])
            Image.new("RGB", (16, 16), (200, 9, 9)).save(path, pnginfo=described)
    started = replace(
        found.variants[0].runs[0], identity=found.variants[0].runs[0].identity | {"facts.start_from": "x"}
    )
    found.variants[0] = replace(found.variants[0], runs=[started])
    assert picture_grids.pictures(found, tmp_path / "started.png")
    with Image.open(tmp_path / "started.png") as grid:
        colours = {colour for _, colour in grid.getcolors(1 << 20)}
    assert (160, 90, 90) in colours and (200, 9, 9) not in colours


def test_a_damaged_file_of_one_outcome_is_a_sentence(tmp_path):
    one, two = runs(tmp_path)
    (one / "base_images.parquet").write_bytes(b"PAR1")
    measure(two, "prior", float("nan"))
    records = [read_record(folder) for folder in (one, two)]
    assert ["base_images.parquet is damaged" in problem for problem in records[0].problems] == [True]
    assert ["prior.parquet has values that are not finite" in problem for problem in records[1].problems] == [True]
    assert set(records[0].curves) == {"evaluation"} and set(records[1].curves) == {"evaluation", "base_images"}
    # The means in the log are those of the ratios to the base.
    (one / "base_images.parquet").write_bytes((two / "base_images.parquet").read_bytes())
    curve = read_record(one).curves["base_images"]
    log = (one / "metrics.jsonl").read_text()
    for mean, known in ((float(np.log(curve.loss / curve.base.astype(float))[-1].mean()), True), (0.5, False)):
        (one / "metrics.jsonl").write_text(log + json.dumps({"step": 20, "evaluation/kept": mean}) + "\n")
        found = read_record(one)
        assert ("base_images" in found.curves) is known
        assert any("does not have the results of step 20" in problem for problem in found.problems) is not known
