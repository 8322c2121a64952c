"""A validation set of one image, or drift on one caption: the page has the means, and no standard error."""

import numpy as np
from fake_runs import FakeValidationSet, fake_run

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
    assert ["r1", "0.25", "-"] in [row for table in rows for row in table]
    assert "+-" not in str(tables.runs(found))
    assert plots.validation_curves(found, tmp_path / "curves.png")


def test_several_images_have_the_clustered_error():
    losses = np.random.default_rng(0).random((3, 2))
    assert mean_and_error(losses) == clustered_mean(losses)
    assert " +- 0." in mean_with_error(losses, ".5f")
    assert mean_with_error(losses[:1], ".5f") == f"{losses[:1].mean():.5f}"
