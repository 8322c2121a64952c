"""What a finished run has lost or lacks: each is named by one sentence, wherever else the file is read."""

from types import SimpleNamespace

import numpy as np
from fake_runs import FakeValidationSet

from sushi_research.config.ema import EmaSection
from sushi_research.evaluation.measured_sets import MeasuredSets
from sushi_research.evaluation.results import Results
from sushi_research.runs.run_folder import RunFolder
from sushi_research.training import run_end, run_outputs


def test_damaged_results_do_not_hide_what_else_a_run_with_a_best_file_has_lost(tmp_path):
    config = SimpleNamespace(evaluation=SimpleNamespace(keep_best=True), sample=SimpleNamespace(enabled=False))
    config.ema = EmaSection()
    run = RunFolder(tmp_path, None)
    run.evaluation.write_bytes(b"no table")
    sets = MeasuredSets(FakeValidationSet())
    lost = run_outputs.lost(SimpleNamespace(run=run, config=config), None, {"finished_at": 4}, 4, sets)
    assert lost == {run.adapter: f"{run.adapter} is missing"}


def test_a_run_without_a_best_step_says_so(tmp_path):
    config = SimpleNamespace(evaluation=SimpleNamespace(keep_best=True))
    run, measured = RunFolder(tmp_path, None), FakeValidationSet()
    losses = np.ones((len(measured.names), measured.noise_samples))
    Results(run.evaluation).append(measured, 4, losses * np.nan, losses)
    said = next(run_end._warnings(SimpleNamespace(run=run, config=config), SimpleNamespace(skipped_steps=0), 4))
    assert said.startswith("no evaluation after step 0 has finite values")
