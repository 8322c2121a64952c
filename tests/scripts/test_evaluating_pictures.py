"""Runs whose evaluations generate pictures: what is recorded, and what a continued run and scripts/evaluate.py make of it."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from script_runs import Trainer
from test_evaluating import evaluate_adapters, make_pictures

from sushi_research.evaluation.results import Results
from testing import run_equality

FILES = ["00-kept-seed0.png", "00-learned-seed0.png", "01-kept-seed0.png", "01-learned-seed0.png"]


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict:
    return {
        "train.steps": 2,
        "optimizer.lr": 0.02,
        "lora.save_dtype": "float32",
        "evaluation.path": str(make_pictures(tmp_path_factory.mktemp("held"), 3, 9)),
        "evaluation.every": None,
        "evaluation.noise_samples": 4,
        "evaluation.drift_captions": ["a cat", "a dog"],
        "evaluation.pictures": 2,
        "sample.steps": 2,
    }


@pytest.fixture(scope="module")
def whole(bases, photos, settings, caches, tmp_path_factory) -> Trainer:
    """The finished run "whole" of these settings, trained once."""
    trainer = Trainer("sd15", bases["sd15"], photos, tmp_path_factory.mktemp("whole"), caches)
    assert trainer.train("whole", settings) == 0
    return trainer


def images(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder / "pictures")) for path in (folder / "pictures").rglob("*"))


@pytest.mark.slow
def test_what_is_recorded(whole):
    folder = whole.folder("whole")
    steps = ["step-00000000", "step-00000002"]
    assert images(folder) == sorted([*steps, *(f"{step}/{name}" for step in steps for name in FILES)])
    learned, kept = (Results(folder / f"pictures_{kind}.parquet").arrays() for kind in ("learned", "kept"))
    assert learned.steps == kept.steps == (0, 2) and kept.names == ("a cat", "a dog")
    assert np.array_equal(learned.loss[0], learned.base) and (learned.loss[1] != learned.base).all()
    assert not kept.loss[0].any() and not kept.base.any() and (kept.loss[1] > 0).all()
    assert learned.loss.shape == kept.loss.shape == (2, 2, 1) and not learned.timesteps.any()
    with Image.open(folder / "pictures/step-00000002/01-kept-seed0.png") as image:
        assert image.info["prompt"] == "a dog" and image.size == (64, 64)
    with Image.open(folder / "pictures/step-00000002/00-learned-seed0.png") as image:
        assert image.info["prompt"] == learned.names[0] and learned.names[0].startswith("held-out picture")
    [*_, last] = [line for line in whole.metrics("whole") if "evaluation/loss" in line]
    ratio = np.log(learned.loss[1].astype(float) / learned.base)
    assert last["evaluation/pictures_learned"] == pytest.approx(ratio.mean(), rel=1e-6)
    assert last["evaluation/pictures_kept"] == pytest.approx(kept.loss[1].mean(), rel=1e-6)
    assert last["evaluation/pictures_kept_se"] > 0 and last["evaluation/pictures_learned_se"] > 0
    assert whole.plan("whole")["evaluation"]["pictures"] == {"learned": 2, "kept": 2}


@pytest.mark.slow
def test_a_continued_run_makes_up_for_what_is_missing_as_far_as_the_disk_has_room(
    whole, settings, monkeypatch, capsys, caplog
):
    expected = whole.folder("whole")
    folder = shutil.copytree(expected, whole.folder("again"))
    Results(folder / "pictures_kept.parquet").cut_back(0)
    first, last = (folder / f"pictures/step-0000000{step}" for step in (0, 2))
    (last / FILES[0]).unlink()
    (last / FILES[1]).write_bytes(b"")
    (first / FILES[1]).unlink()
    replace = os.replace

    def refuse(source, target):
        if Path(target).parent == first:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    learned = (folder / "pictures_learned.parquet").read_bytes()
    assert whole.train("again", settings) == 0
    said = capsys.readouterr().out
    for problem in ("pictures_kept.parquet has no results of step 2", f"pictures/step-00000002/{FILES[1]} is empty"):
        assert f"warning: {folder}/{problem}: it is made again" in said
    assert (folder / "pictures_learned.parquet").read_bytes() == learned, "what is on record is kept"
    for name in FILES:
        assert (last / name).read_bytes() == (expected / "pictures/step-00000002" / name).read_bytes()
    # The means of step 2 that were dropped are on a line of their own now.
    differences = [each for each in run_equality.differences(folder, expected) if "metrics.jsonl" not in each]
    assert differences == [f"again: images has other keys: pictures/step-00000000/{FILES[1]}"]
    without = f"{first / FILES[1]}: No space left on device: the run goes on without the pictures of step 0"
    assert caplog.messages == [f"cannot write {without}"], "the base's are made with the last ones"


@pytest.mark.slow
def test_an_adapter_file_has_the_pictures_of_its_run(whole, tmp_path):
    folder, output = whole.folder("whole"), tmp_path / "evaluations"
    found = evaluate_adapters(whole, "whole", output, [folder / f"{folder.name}.safetensors"])
    for name, step, of_run in (("base", 0, 0), ("whole", 1, 2)):
        for kind in ("learned", "kept"):
            mine, its = (Results(path / f"pictures_{kind}.parquet").arrays() for path in (output / name, folder))
            assert mine.names == its.names and mine.steps == (step,) and np.array_equal(mine.base, its.base)
            assert np.array_equal(mine.loss[0], its.loss[its.steps.index(of_run)])
        for file in FILES:
            paths = (
                output / name / f"pictures/step-0000000{step}" / file,
                folder / f"pictures/step-0000000{of_run}" / file,
            )
            assert paths[0].read_bytes() == paths[1].read_bytes()
    assert found["base"]["evaluation/pictures_kept"] == 0 < found["whole"]["evaluation/pictures_kept"]
    assert "| pictures, learned | pictures, kept |" in (output / "evaluation.md").read_text()
