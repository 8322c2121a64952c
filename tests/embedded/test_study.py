"""The study of measures: its statistics, and that its page is of the recorded results and these files."""

from __future__ import annotations

import json

import numpy as np
import pytest

from demo import records
from demo.study import analysis, candidates, page, results
from demo.study.analysis import APART, agreement, ordered, spearman
from demo.study.recipes import SETTINGS, recipes


def test_pairs_count_if_their_scores_are_apart_and_a_tie_is_half_right():
    scores = np.array([0, APART, APART + 1, 2 * APART])
    assert ordered(-scores, scores) == (4, 4)  # APART and APART + 1 are not apart, nor are APART + 1 and 2 APART
    assert ordered(scores, scores) == (0, 4)
    assert ordered(np.zeros(4), scores) == (2, 4)


def test_spearman_is_the_correlation_of_mean_ranks():
    # Ranks 0, 1.5, 1.5, 3 against 0, 1, 2, 3: covariance 1.125 over deviations of 1.0607 and 1.1180.
    assert spearman(np.array([1, 2, 2, 9]), np.array([3, 5, 7, 8])) == pytest.approx(4.5 / np.sqrt(4.5 * 5))
    assert np.isnan(spearman(np.ones(4), np.arange(4)))


def test_the_interval_is_over_recipes(monkeypatch):
    monkeypatch.setattr(analysis, "RESAMPLES", 200)
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 33, 40)
    noise = rng.normal(0, 8, 40)
    single, pooled = (agreement(noise - scores, scores, [str(k // size) for k in range(40)]) for size in (1, 20))
    assert single.share == pooled.share and single.share_low < single.share < single.share_high
    assert {pooled.share_low, pooled.share_high} != {single.share_low, single.share_high}


def test_a_log_ratio_takes_the_timesteps_of_its_range():
    arrays = {
        "loss/held_out": np.array([[1.0, 2.0, 4.0, 8.0]], np.float32),
        "base_loss/held_out": np.ones((1, 4), np.float32),
        "times/held_out": np.array([[10, 400, 749, 750]]),
    }
    assert candidates.LEARNED["log, t >= 750"](arrays, arrays) == pytest.approx([np.log(8)])
    assert candidates.LEARNED["log, all timesteps"](arrays, arrays) == pytest.approx([np.log(64) / 4])


def test_every_setting_has_seven_recipes_at_several_lengths_and_all_are_recorded():
    for setting in SETTINGS:
        assert len(recipes(setting)) >= 7 and len(setting.steps) >= 3
        assert results.is_complete(setting), setting.name


def test_the_page_claims_what_the_recorded_results_show():
    studied = results.recorded()
    text = (results.FOLDER / "measure.md").read_text()
    claims = page.claims(studied)
    assert len(claims) == 6
    for claim in claims:
        assert f"- {claim}\n" in text
    for setting, adapters in studied.items():
        for a in adapters:
            assert f"| {setting}: {a.recipe} at {a.steps} | {a.concept} | {a.kept} |" in text


def test_the_recorded_results_are_of_these_files():
    recorded = json.loads(results.INPUTS.read_text())
    changed = records.differences(recorded, records.dependencies(results.inputs()), "inputs")
    assert not changed, f"run python -m demo.study again: {changed} changed since its results were recorded"
