"""Runs on bases that are held in different ways: their losses are over different bases, their scores are not."""

import json
from dataclasses import replace

from fake_runs import fake_run

from sushi_research.experiments.comparison import compare
from sushi_research.reports.run_record import read_record


def test_losses_over_another_base_are_not_compared_and_scores_are(tmp_path):
    folders = [fake_run(tmp_path / name, rank=rank, noise_seed=rank) for rank, name in enumerate("abc", 1)]
    for level, folder in enumerate(folders):
        values = {f"prompt {number}": level + 0.01 * number**level for number in range(10)}
        score = {"x": {"about": "learned", "values": values}}
        (folder / "scores.json").write_text(json.dumps(score))
    full, older, small = map(read_record, folders)
    full = replace(full, settings=full.settings | {"model.base_storage": "compute"})
    small = replace(small, settings=small.settings | {"model.base_storage": "nf4"})
    found = compare([full, older, small])
    notes = {(pair.candidate.runs[0].name, pair.reference.runs[0].name): pair.note for pair in found.learned}
    assert notes["b", "a"] == ""  # a run from before there was the setting
    for pair in (("c", "a"), ("c", "b")):
        assert "model.base_storage" in notes[pair] and "scripts/evaluate.py" in notes[pair]
    assert all(pair.values is not None and pair.at for pair in found.outcomes["score x"])
