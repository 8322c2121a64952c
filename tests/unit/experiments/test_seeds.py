"""A seed that was trained twice is no further evidence: copies of a run change no test result."""

import shutil

import pytest
from fake_runs import fake_run

from sushi_research.experiments.comparison import compare
from sushi_research.reports import statistics
from sushi_research.reports.run_record import read_record


@pytest.fixture(autouse=True)
def fewer_resamples(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 999)
    monkeypatch.setattr(statistics, "MAX_PAIRS", 50)


def compared(folders):
    [pair] = compare([read_record(folder) for folder in folders], "a").learned
    return pair


@pytest.mark.parametrize("trial", range(5))
def test_copies_of_runs_change_no_interval(tmp_path, trial):
    """Equal variants with a seed effect: counted as further seeds, copies shrink the interval and find a difference."""
    runs = {
        (name, seed): fake_run(
            tmp_path / f"{name}-seed{seed}",
            0.05,
            seed=seed,
            rank=rank,
            noise_seed=1000 * trial + 10 * rank + seed,
            noise=0.01,
        )
        for rank, name in ((1, "a"), (2, "b"))
        for seed in (0, 1)
    }
    once = compared(runs.values())
    copies = [shutil.copytree(runs["a", 0], tmp_path / f"again{number}/a-seed0") for number in range(3)]
    copies.append(shutil.copytree(runs["b", 1], tmp_path / "again/b-seed1"))
    twice = compared([*runs.values(), *copies])
    assert twice.outcome == once.outcome and twice.outcome.difference.seeds == (2, 2)
    assert twice.same_seeds and once.same_seeds
    # One variant with copies of one seed alone is about that run.
    alone = compared([runs["a", 0], *copies[:3], runs["b", 0]])
    assert alone.outcome.difference.seeds == (1, 1) and not alone.same_seeds


def test_what_is_averaged_or_left_out_is_said(tmp_path):
    runs = [fake_run(tmp_path / f"a{number}", 0.05, seed=seed, rank=1) for number, seed in enumerate((3, 3, 4))]
    runs += [fake_run(tmp_path / f"b{number}", 0.04, seed=3, rank=2) for number in range(2)]
    records = [read_record(run) for run in runs]
    unknown = [records[2], *records[3:]]
    for record in unknown:
        del record.identity["train.seed"]
    found = compare(records)
    assert any("a0 has 2 runs of seed 3 (a0, a1): their losses are averaged" in warning for warning in found.warnings)
    assert any("a0 has runs of an unknown seed (a2): no test result" in warning for warning in found.warnings)
    assert any("b0 has 2 runs of an unknown seed (b0, b1)" in warning for warning in found.warnings)
    [pair] = found.learned
    assert pair.outcome.difference.seeds == (1, 1)
