"""Runs of which some were recorded and others were not are variants of their own."""

import json

from fake_runs import fake_run

from sushi_research.experiments import step_paths
from sushi_research.experiments.comparison import warnings_of
from sushi_research.experiments.variants import variants_of
from sushi_research.reports.run_record import read_record


def run(folder, seed, *launches):
    """A run with a launch for each (step, path); a path of None is that of a version that did not record one."""
    path = fake_run(folder, seed=seed)
    file = path / "provenance.json"
    entry = json.loads(file.read_text())[-1]
    entries = [entry | {"step": step} | ({"step_path": each} if each else {}) for step, each in launches]
    file.write_text(json.dumps(entries))
    return read_record(path)


def test_recorded_and_eager_runs_are_not_pooled(tmp_path):
    old, eager = run(tmp_path / "a-seed0", 0, (0, None)), run(tmp_path / "a-seed1", 1, (0, "eager"))
    fast, changed = (
        run(tmp_path / "b-seed0", 0, (0, "recorded")),
        run(tmp_path / "c-seed0", 0, (0, "eager"), (5, "recorded"), (12, "recorded")),
    )
    variants, by_run = variants_of([old, eager, fast, changed])
    assert not by_run and [[run.name for run in each.runs] for each in variants] == [
        ["a-seed0", "a-seed1"],
        ["b-seed0"],
        ["c-seed0"],
    ]
    rows = step_paths.differing([each.runs for each in variants], [False] * 3)
    assert rows == {"step path": ["eager", "recorded", "eager, recorded from step 5"]}
    assert step_paths.differing([[old], [eager]], [False] * 2) == {}
    found = [line for line in warnings_of([old, eager, fast]) if "step path" in line]
    assert found == [
        "not all runs have the same step path (eager: a-seed0, a-seed1; recorded: b-seed0): rounding may differ, and their "
        "training times are not comparable"
    ]
