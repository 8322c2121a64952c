"""Runs whose evaluations generate pictures: what is recorded, that training is as without, and that a stop changes nothing."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from script_runs import Trainer, assert_equal
from test_evaluating import evaluate_adapters, make_pictures
from test_resume import at_micro_batch, stop

from sushi_research.errors import UserError
from sushi_research.evaluation import picture_distances, pictures
from sushi_research.evaluation.results import Results
from testing import run_equality

FILES = ["00-kept-seed0.png", "00-learned-seed0.png", "01-kept-seed0.png", "01-learned-seed0.png"]


@pytest.fixture
def architecture() -> str:
    return "sd15"


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict:
    return {
        "train.steps": 3,
        "checkpoint.every": 2,
        "optimizer.lr": 0.02,
        "lora.save_dtype": "float32",
        "evaluation.path": str(make_pictures(tmp_path_factory.mktemp("held"), 3, 9)),
        "evaluation.every": 2,
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


def test_what_is_recorded(whole, settings):
    folder = whole.folder("whole")
    steps = [f"step-0000000{step}" for step in (0, 2, 3)]
    assert images(folder) == sorted([*steps, *(f"{step}/{name}" for step in steps for name in FILES)])
    learned, kept = (Results(folder / f"pictures_{kind}.parquet").arrays() for kind in ("learned", "kept"))
    assert learned.steps == kept.steps == (0, 2, 3) and kept.names == ("a cat", "a dog")
    assert np.array_equal(learned.loss[0], learned.base) and (learned.loss[1:] != learned.base).all()
    assert not kept.loss[0].any() and not kept.base.any() and (kept.loss[1:] > 0).all()
    assert learned.loss.shape == kept.loss.shape == (3, 2, 1) and not learned.timesteps.any()
    with Image.open(folder / "pictures/step-00000003/01-kept-seed0.png") as image:
        assert image.info["prompt"] == "a dog" and image.size == (64, 64)
    with Image.open(folder / "pictures/step-00000003/00-learned-seed0.png") as image:
        assert image.info["prompt"] == learned.names[0] and learned.names[0].startswith("held-out picture")
    [*_, last] = [line for line in whole.metrics("whole") if "evaluation/loss" in line]
    ratio = np.log(learned.loss[2].astype(float) / learned.base)
    assert last["evaluation/pictures_learned"] == pytest.approx(ratio.mean(), rel=1e-6)
    assert last["evaluation/pictures_kept"] == pytest.approx(kept.loss[2].mean(), rel=1e-6)
    assert last["evaluation/pictures_kept_se"] > 0 and last["evaluation/pictures_learned_se"] > 0
    assert whole.plan("whole")["evaluation"]["pictures"] == {"learned": 2, "kept": 2}


def test_without_pictures_nothing_is_generated_and_the_run_learns_the_same(trainer, settings, whole, monkeypatch):
    monkeypatch.setattr(pictures, "generate_missing", None)
    assert trainer.train("plain", settings | {"evaluation.pictures": 0}) == 0
    folder = trainer.folder("plain")
    assert not (folder / "pictures").exists() and not list(folder.glob("pictures*"))
    assert_equal(trainer.checkpoint("plain").load(), whole.checkpoint("whole").load())
    of_whole = [{key: line[key] for key in line if "/pictures" not in key} for line in whole.metrics("whole")]
    assert trainer.metrics("plain") == of_whole


@pytest.mark.slow
def test_a_run_in_pieces_has_the_same_pictures_and_makes_lost_ones_again(trainer, settings, whole, capsys, monkeypatch):
    with at_micro_batch(trainer, 2, 0, stop):
        assert trainer.train("pieces", settings) > 128
    folder = trainer.folder("pieces")
    assert not (folder / "pictures/step-00000003").exists()
    assert trainer.train("pieces", settings) == 0
    assert run_equality.differences(folder, whole.folder("whole")) == []

    of_last = folder / "pictures/step-00000003"
    (of_last / FILES[0]).unlink()
    (of_last / FILES[1]).write_bytes(b"")
    capsys.readouterr()
    assert trainer.train("pieces", settings) == 0
    said = capsys.readouterr().out
    for name, problem in zip(FILES, ["missing", "empty"], strict=False):
        assert f"warning: {of_last / name} is {problem}: it is made again" in said
    assert run_equality.differences(folder, whole.folder("whole")) == []

    # One more caption for each: the earlier results and images are dropped, with a sentence.
    assert trainer.train("pieces", settings | {"evaluation.pictures": 3, "train.steps": 4}) == 0
    said = capsys.readouterr().out
    for kind in ("held-out", "neutral"):
        known = f"the pictures of {kind} captions are drawn otherwise: earlier pictures of {kind} captions are dropped"
        assert (f"warning: {known}" in said) is (kind == "held-out"), "there are two neutral captions only"
    assert Results(folder / "pictures_kept.parquet").steps() == [0, 2, 3, 4]
    assert Results(folder / "pictures_learned.parquet").steps() == [4]
    assert len(images(folder)) == 4 + 2 * 2 + 2 * 5, "the kept ones of steps 2 and 3, and all of 0 and 4"


@pytest.mark.slow
def test_a_run_goes_on_without_images_that_cannot_be_written_and_with_values_that_are_not_finite(
    trainer, settings, monkeypatch, caplog
):
    replace, measured = os.replace, picture_distances.distance

    def refuse(source, target):
        if Path(target).parent.name == "step-00000000":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    def overflow(picture, reference):
        found = measured(picture, reference)
        return found if found == 0 else float("nan")

    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr(picture_distances, "distance", overflow)
    assert trainer.train("full", settings | {"train.steps": 1}) == 0
    folder = trainer.folder("full")
    assert images(folder) == ["step-00000000", "step-00000001", *(f"step-00000001/{name}" for name in FILES)]
    said = "pictures/step-00000000/00-learned-seed0.png: No space left on device: the run goes on without the pictures of step 0"
    assert len([message for message in caplog.messages if message.endswith(said)]) == 2, "step 1 tries again"
    assert any("step 1: pictures of neutral captions are not finite" in message for message in caplog.messages)
    line = [line for line in trainer.metrics("full") if "evaluation/loss" in line][-1]
    assert line["evaluation/pictures_kept"] is line["evaluation/pictures_learned"] is None
    monkeypatch.undo()
    # Only what is lost of the last step is made again, and with it the base's.
    (folder / "pictures/step-00000001" / FILES[2]).unlink()
    assert trainer.train("full", settings | {"train.steps": 1}) == 0
    assert len(images(folder)) == 10


@pytest.mark.slow
def test_an_adapter_file_has_the_pictures_of_its_run(whole, tmp_path):
    folder, output = whole.folder("whole"), tmp_path / "evaluations"
    found = evaluate_adapters(whole, "whole", output, [folder / "adapter.safetensors"])
    for name, step, of_run in (("base", 0, 0), ("whole", 1, 3)):
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
    # Without held-out images, all images of data.path are the validation set.
    words = [
        "--evaluation.held_out=0",
        "--evaluation.path=null",
        f"--data.path={make_pictures(tmp_path / 'more', 2, 3)}",
    ]
    again = evaluate_adapters(whole, "whole", output, [folder / "adapter.safetensors"], *words)
    assert Results(output / "whole/pictures_learned.parquet").arrays().names == (
        "held-out picture 0",
        "held-out picture 1",
    )
    assert again["whole"]["evaluation/pictures_kept"] == found["whole"]["evaluation/pictures_kept"]


@pytest.mark.slow
def test_out_of_memory_has_advice_of_its_own(trainer, settings, monkeypatch):
    def out_of_memory(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(pictures, "decode", out_of_memory)
    with pytest.raises(UserError, match=r"while generating the pictures of step 0: .*--evaluation\.pictures 0\.$"):
        trainer.train("decoding", settings)
    monkeypatch.setattr(pictures, "generate_missing", out_of_memory)
    with pytest.raises(UserError, match=r"out of memory while generating the base's pictures: .*--sample\.width"):
        trainer.train("generating", settings)
