"""Seconds by phase."""

from __future__ import annotations

from sushi_research.progress import Phases


def test_a_phase_that_is_entered_again_adds_up() -> None:
    now = 10.0
    phases = Phases("planning", clock=lambda: now)
    now = 11.5
    phases.enter("training")
    now = 14.0
    phases.enter("drawing")
    now = 15.0
    phases.enter("training")
    now = 15.25
    assert phases.seconds() == {"planning": 1.5, "training": 2.75, "drawing": 1.0}
    now = 16.25
    assert phases.seconds()["training"] == 3.75, "the phase goes on after it was asked"
    assert list(phases.seconds()) == ["planning", "training", "drawing"]
