"""Seconds by stage."""

from __future__ import annotations

import time

import psutil

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


def test_the_first_timings_of_a_process_begin_with_its_start(monkeypatch) -> None:
    monkeypatch.setattr(StageTimings, "_process_is_new", True)
    first, second = StageTimings.of_process("planning"), StageTimings.of_process("planning")
    assert first.current == second.current == "planning"
    started = psutil.Process().create_time()
    # The start of a process is known to a second where only psutil knows it.
    assert abs(first.seconds()["starting"] - (time.time() - started)) < 1.5
    assert "starting" not in second.seconds()


def test_a_stage_that_had_nothing_to_do_is_left_out() -> None:
    now = 0.0
    timings = StageTimings("planning", clock=lambda: now)
    now = 2.0
    timings.enter("caching")
    now = 2.01
    timings.enter("training")
    now = 3.0
    assert list(timings.seconds()) == ["planning", "training"]
