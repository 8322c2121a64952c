"""A file whose step was chosen says on which images, and is not tested on them."""

from __future__ import annotations

import json

import torch
from fake_runs import fake_run
from safetensors.torch import save_file

from sushi_research.adapters import chosen_step
from sushi_research.evaluation.unseen import chosen_on
from sushi_research.experiments.comparison import compare
from sushi_research.reports.run_record import read_record

HASHES = [f"{number:032x}"[::-1] for number in range(6)]


def test_the_choice_is_found_on_the_same_images_whatever_the_set_is_called(tmp_path):
    path = tmp_path / "best.safetensors"
    save_file({"a": torch.zeros(1)}, path, metadata=chosen_step.metadata_of("f" * 32, HASHES[:3], 250, 4))
    found = chosen_step.chosen_step(path)
    assert found.describe() == f"step 250, the best of the evaluations up to it (4) on the validation set {'f' * 32}"
    assert (
        found.is_of("f" * 32, HASHES[4:]) and found.is_of("other", HASHES[2:]) and not found.is_of("other", HASHES[3:])
    )
    [sentence] = chosen_on([str(path)], "other", HASHES[2:])
    assert "step 250" in sentence and chosen_on([str(path)], "other", HASHES[3:]) == []
    save_file({"a": torch.zeros(1)}, path)
    assert chosen_step.chosen_step(path) is None and chosen_step.chosen_step(tmp_path / "none") is None


def test_a_comparison_excludes_a_file_chosen_on_its_images_and_uses_it_on_others(tmp_path):
    folders = [fake_run(tmp_path / name, seed=number) for number, name in enumerate(("run", "best", "elsewhere"))]
    for folder, on_these in zip(folders[1:], (True, False), strict=True):
        (folder / "run.json").unlink()
        [entry] = json.loads((folder / "provenance.json").read_text())
        chosen = {"step": "250", "among": "4", "validation_set": "set-hash", "on_these_images": on_these}
        entry["adapter"] = {"file": "best.safetensors", "validation_images_unseen": True, "chosen": chosen}
        (folder / "provenance.json").write_text(json.dumps([entry]))
    comparison = compare([read_record(folder) for folder in folders])
    assert [variant.runs[0].path.name for variant in comparison.variants] == ["run", "elsewhere"]
    [sentence] = [each for each in comparison.warnings if "is excluded" in each]
    assert f"{folders[1]} is excluded: its step 250 was chosen as the best of the evaluations up to it (4) " in sentence
