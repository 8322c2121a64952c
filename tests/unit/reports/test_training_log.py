"""metrics.jsonl is read whole and in order, or a sentence names it; and the training time is that of one clock."""

import json

import numpy as np
import pytest

from sushi_research.errors import UserError
from sushi_research.reports.training_log import read_log, training_times

STEPS = range(1, 9)


def lines_of(**times):
    """Eight steps with an evaluation before them and after the fourth; twice as slow by the wall clock from the fifth on."""
    found = [{"step": 0, "evaluation/loss": 1.0}]
    for step in STEPS:
        found.append({"step": step, "samples_seen": 4 * step, "images_per_second": 8.0 if step < 5 else 4.0} | times)
        if step == 4:
            found.append({"step": 4, "evaluation/loss": 1.0})
    return found


def written(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_whole_file_gives_its_times(tmp_path):
    for times, clock, expected in (({}, "wall clock", [0, 2, 6]), ({"cpu_seconds": 0.25}, "CPU time", [0, 1, 2])):
        path = written(tmp_path / "metrics.jsonl", lines_of(**times))
        found = training_times(path, read_log(path, 8), [0, 4, 8], 4)
        assert found.clock == clock and np.array_equal(found.seconds, expected)
        assert np.array_equal(found.wall_seconds, [0, 2, 6])


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: [lines[0], lines[3], lines[-1]],
        lambda lines: lines[2:],
        lambda lines: lines + lines,
        lambda lines: [*lines[:3], lines[2], *lines[3:]],
        lambda lines: [*lines[:2], lines[3], lines[2], *lines[4:]],
        lambda lines: lines[::-1],
        lambda lines: [*lines[:6], *lines[7:], lines[0]],
        lambda lines: lines[:-1],
        lambda lines: [*lines[:3], lines[4] | {"step": 3}, *lines[4:]],
        lambda lines: [lines[0], {"step": 1.0, "images_per_second": 8.0}, *lines[2:]],
        lambda lines: [lines[0], {"step": 1, "images_per_second": float("nan")}, *lines[2:]],
        lambda lines: [lines[0], {"step": 1, "images_per_second": 8.0, "gpu_seconds": -1}, *lines[2:]],
    ],
)
def test_lines_lost_doubled_reordered_or_wrong_are_one_sentence(tmp_path, change):
    path = written(tmp_path / "metrics.jsonl", change(lines_of()))
    with pytest.raises(
        UserError, match="metrics.jsonl(, line| ends at step 7, but the run finished at step 8)"
    ) as caught:
        read_log(path, 8)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_said_to_be_missing(tmp_path):
    with pytest.raises(UserError, match="metrics.jsonl is missing"):
        read_log(tmp_path / "metrics.jsonl", 8)
    assert read_log(tmp_path / "metrics.jsonl", None) == [], "a run that has just begun"


def test_times_that_do_not_reach_or_change_their_clock_are_not_used(tmp_path):
    path = written(tmp_path / "metrics.jsonl", lines_of())
    with pytest.raises(UserError, match="ends at step 8, before the last evaluation at step 9"):
        training_times(path, read_log(path, None), [0, 9], 4)
    mixed = [*lines_of()[:4], *lines_of(cpu_seconds=0.25)[4:]]
    with pytest.raises(UserError, match="the wall clock only up to step 3 and CPU time from then on"):
        training_times(path, mixed, [0, 8], 4)
