"""A run measures what is learned, kept and memorised on sets of its own, and makes up for those that are missing."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from script_runs import assert_equal
from test_evaluating import make_pictures
from test_resume import Killed

from sushi_research.evaluation.results import Results
from sushi_research.runs.run_folder import RESULT_FILES
from testing.run_equality import rows

ONE = pytest.mark.parametrize("architecture", ["sd15"])
MEASURED = [RESULT_FILES[name] for name in ("validation", "drift", "base_images", "prior", "trained")]


@pytest.mark.slow
@ONE
def test_each_set_is_recorded_and_a_missing_file_is_made_up_for(trainer, photos, tmp_path, monkeypatch):
    data = tmp_path / "data"
    shutil.copytree(photos, data)
    make_pictures(data / "prior", 4, 21)
    settings = {
        "data.path": str(data),
        "train.steps": 2,
        "checkpoint.every": 1,
        "evaluation.path": str(make_pictures(tmp_path / "held", 2, 22)),
        "evaluation.prior_path": str(data / "prior"),
        "evaluation.every": 1,
        "evaluation.noise_samples": 4,
        "evaluation.drift_captions": ["a cat"],
    }
    assert trainer.train("whole", settings) == 0
    whole = trainer.folder("whole")
    [prior] = json.loads((whole / "data_report.json").read_text())["prior"]
    assert prior.startswith("prior/") and trainer.plan("whole")["evaluation"]["prior_images"] == 1
    last = [line for line in trainer.metrics("whole") if "evaluation/loss" in line][-1]
    for name, key in (("prior", "prior"), ("base_images", "kept"), ("trained", "trained")):
        found = Results(whole / RESULT_FILES[name]).arrays()
        assert found.steps == (0, 1, 2) and found.loss.shape[1] == {"trained": 2}.get(name, 1)
        ratio = np.log(found.loss[-1].astype(float) / found.base).mean()
        assert last[f"evaluation/{key}"] == pytest.approx(ratio, rel=1e-6) and ratio != 0

    # Killed at the last step, after one of the files was written.
    append, written = Results.append, []

    def kill(results, measured, step, *values):
        if step == 2 and results.path.name == RESULT_FILES["trained"]:
            raise Killed
        written.append((results.path.name, step))
        append(results, measured, step, *values)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(Results, "append", kill)
        trainer.train("pieces", settings)
    pieces = trainer.folder("pieces")
    assert (RESULT_FILES["prior"], 2) in written and Results(pieces / RESULT_FILES["trained"]).steps() == [0, 1]
    written.clear()
    with monkeypatch.context() as patched:
        patched.setattr(Results, "append", lambda *values: written.append(values[0].path.name) or append(*values))
        assert trainer.train("pieces", settings) == 0
    assert sorted(written) == sorted(RESULT_FILES[name] for name in ("trained", "drift", "base_images"))
    for name in MEASURED:
        assert rows(pieces / name) == rows(whole / name), name
    assert trainer.metrics("pieces") == trainer.metrics("whole")
    assert_equal(trainer.adapter("pieces"), trainer.adapter("whole"))
