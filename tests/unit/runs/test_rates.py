"""Measured rates: what is kept, and what is estimated from it."""

from __future__ import annotations

import pytest

from sushi_research.runs import rates

CONDITIONS = {"device": "a card", "precision": "bf16", "step": "eager"}


def test_between_and_beyond_the_measured_sizes(tmp_path):
    assert rates.seconds_of(tmp_path, CONDITIONS, 1e12) is None
    rates.remember(tmp_path, CONDITIONS, 10e12, 0.2)
    assert rates.seconds_of(tmp_path, CONDITIONS, 20e12) == pytest.approx(0.4)
    rates.remember(tmp_path, CONDITIONS, 20e12, 0.3)
    rates.remember(tmp_path, CONDITIONS | {"step": "recorded"}, 20e12, 0.1)
    found = [rates.seconds_of(tmp_path, CONDITIONS, flops * 1e12) for flops in (5, 10, 15, 20, 40)]
    assert found == pytest.approx([0.15, 0.2, 0.25, 0.3, 0.5])
    rates.remember(tmp_path, CONDITIONS, 10.1e12, 0.1)  # replaces the size that is about the same
    assert rates.seconds_of(tmp_path, CONDITIONS, 10.1e12) == pytest.approx(0.1)


def test_files_of_other_machines_count_and_damaged_ones_do_not(tmp_path, monkeypatch):
    monkeypatch.setattr(rates.platform, "node", lambda: "../one/machine")
    rates.remember(tmp_path, CONDITIONS, 10e12, 0.2)
    monkeypatch.setattr(rates.platform, "node", lambda: "two")
    (tmp_path / "rates/two.json").write_text('{"format": 1, "rates": {"x": [[1, "a"], 3, [1]], "y": 3}}')
    (tmp_path / "rates/three.json").write_text("{")
    assert rates.seconds_of(tmp_path, CONDITIONS, 10e12) == 0.2
    rates.remember(tmp_path, CONDITIONS, 30e12, 0.4)
    assert rates.seconds_of(tmp_path, CONDITIONS, 20e12) == pytest.approx(0.3)
    assert {path.name for path in (tmp_path / "rates").iterdir()} == {".._one_machine.json", "two.json", "three.json"}
