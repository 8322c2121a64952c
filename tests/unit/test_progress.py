"""Seconds by stage."""

from __future__ import annotations

from sushi_research.progress import StageTimings


def test_a_stage_that_is_entered_again_adds_up() -> None:
    now = 10.0
    timings = StageTimings("planning", clock=lambda: now)
    now = 11.5
    timings.enter("training")
    now = 14.0
    timings.enter("sampling")
    now = 15.0
    timings.enter("training")
    now = 15.25
    assert timings.seconds() == {"planning": 1.5, "training": 2.75, "sampling": 1.0}
    now = 16.25
    assert timings.seconds()["training"] == 3.75, "the stage goes on after it was asked"
    assert list(timings.seconds()) == ["planning", "training", "sampling"]
