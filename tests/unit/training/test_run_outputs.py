"""What a finished run has lost: a damaged file is named by one sentence, wherever else it is read."""

from types import SimpleNamespace

from fake_runs import FakeValidationSet

from sushi_research.evaluation.measured_sets import MeasuredSets
from sushi_research.runs.run_folder import RunFolder
from sushi_research.training import run_outputs


def test_damaged_results_do_not_hide_what_else_a_run_with_a_best_file_has_lost(tmp_path):
    config = SimpleNamespace(evaluation=SimpleNamespace(keep_best=True), sample=SimpleNamespace(enabled=False))
    run = RunFolder(tmp_path, None)
    run.evaluation.write_bytes(b"no table")
    sets = MeasuredSets(FakeValidationSet())
    lost = run_outputs.lost(SimpleNamespace(run=run, config=config), None, {"finished_at": 4}, 4, sets)
    assert lost == {run.adapter: f"{run.adapter} is missing"}
