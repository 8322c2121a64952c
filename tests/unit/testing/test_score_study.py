"""The stored study of the test of scores: made with the present code, the numbers of the docs, and what it shows."""

import json
import math

import pytest

from testing import score_study


@pytest.fixture(scope="module")
def result():
    return json.loads(score_study.RESULT.read_text(encoding="utf-8"))


def test_the_result_was_made_with_the_present_code(result):
    assert result["inputs"] == score_study.input_hashes(), (
        "the statistics have changed since the study: run python -m testing.score_study"
    )


def test_the_tables_in_the_docs_are_the_result(result):
    docs = (score_study.ROOT / "docs/experiments.md").read_text(encoding="utf-8")
    rows = score_study.table_rows(result)
    assert len(rows) == 32 and [row for row in rows if row not in docs] == []


def test_it_shows_the_level_and_where_the_bootstrap_has_no_power(result):
    # Three standard deviations above 5 %.
    most = 5 + 300 * math.sqrt(0.05 * 0.95 / result["settings"]["trials"])
    assert all(row["sign flips"] < most for row in result["level"])
    everywhere = [row for row in result["power"] if row["shares"] == [0.05, 0.95]]
    assert len(everywhere) == 4 and all(row["sign flips"] > 85 > row["bootstrap-t"] for row in everywhere)


def test_a_small_study_has_the_form_of_the_stored_one(result, monkeypatch):
    for name in ("SEED_EFFECTS", "EQUAL", "DIFFERENT"):
        monkeypatch.setattr(score_study, name, getattr(score_study, name)[1:2])
    small = score_study.study(trials=2, show_progress=False)
    for name in ("level", "power"):
        assert list(small[name][0]) == list(result[name][0])
