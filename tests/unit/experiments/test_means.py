"""A validation set of one image, or drift on one caption: the page has the means, and no standard error."""

import numpy as np
import pytest
from fake_runs import FakeValidationSet, fake_run

from sushi_research.evaluation.outcomes import log_ratio
from sushi_research.evaluation.results import Results
from sushi_research.experiments import page_content, plots, tables
from sushi_research.experiments.comparison import compare
from sushi_research.experiments.means import mean_and_error, mean_with_error
from sushi_research.reports.run_record import read_record
from sushi_research.reports.statistics import clustered_mean


def test_one_image_and_one_caption_have_no_error(tmp_path):
    one = FakeValidationSet(names=("image",))
    runs = []
    for rank in (1, 2):
        folder = fake_run(tmp_path / f"r{rank}", rank=rank, noise_seed=rank, val_set=one)
        captions = FakeValidationSet(names=("a plain wall",), hash="drift")
        Results(folder / "drift.parquet").append(captions, 20, np.full((1, 8), 0.25), np.zeros((1, 8)))
        runs.append(read_record(folder))
    found = compare(runs)
    rows = [block.rows for block in page_content.blocks(found, "title", {}) if block.rows]
    drift = {row[0]: row[-1] for table in rows for row in table if "drift, with standard error" in table[0]}
    assert drift["r1"] == "0.25"
    assert "+-" not in str(tables.runs(found))
    assert plots.validation_curves(found, tmp_path / "curves.png")


@pytest.mark.filterwarnings("error")
def test_a_timestep_bin_without_values_is_empty(tmp_path):
    """One noise sample per image, of which two are in one bin and one is in another."""
    few = FakeValidationSet(names=("a", "b", "c"), noise_samples=1)
    run = read_record(fake_run(tmp_path / "run", val_set=few))
    run.evaluation.timesteps[:] = [[10], [20], [990]]
    over = log_ratio(run.evaluation.loss[-1], run.evaluation.base)[:, 0]
    means, halves = plots.bin_means([run])
    np.testing.assert_allclose(means, [over[:2].mean(), np.nan, np.nan, over[2]])
    assert np.isfinite(halves).tolist() == [True, False, False, False]


def test_several_images_have_the_clustered_error():
    losses = np.random.default_rng(0).random((3, 2))
    assert mean_and_error(losses) == clustered_mean(losses)
    assert " +- 0." in mean_with_error(losses, ".5f")
    assert mean_with_error(losses[:1], ".5f") == f"{losses[:1].mean():.5f}"
