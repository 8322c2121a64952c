"""Values that are not finite (fp16 overflows at a noise sample): the run goes on, says which, and records null."""

from __future__ import annotations

import json

import numpy as np
import pytest
from diffusers import AutoencoderKL

from sushi_research.evaluation import validation_set
from sushi_research.reports.run_record import read_record

SETTINGS = {
    "train.steps": 1,
    "evaluation.held_out": 0.5,
    "evaluation.noise_samples": 4,
    "evaluation.drift_captions": ["a plain wall"],
    "sample.enabled": True,
    "sample.prompts": ["a cat"],
    "sample.steps": 1,
}


@pytest.mark.parametrize("architecture", ["sd15"])
@pytest.mark.slow
def test_a_run_with_values_that_are_not_finite(trainer, monkeypatch, caplog):
    measured, decoded = validation_set.losses, AutoencoderKL.decode
    places = [(0, 1)]

    def overflow(*arguments, **options):
        found = measured(*arguments, **options)
        for place in places:
            found[place] = np.inf
        return found

    def break_image(*arguments, **options):
        found = decoded(*arguments, **options)
        found.sample[0, 0, 0, 0] = np.nan
        return found

    monkeypatch.setattr(validation_set, "losses", overflow)
    monkeypatch.setattr(AutoencoderKL, "decode", break_image)
    assert trainer.train("run", SETTINGS) == 0
    [before, after] = [line for line in trainer.metrics("run") if "evaluation/loss" in line]
    for line in (before, after):
        assert (
            line["evaluation/loss"] is line["evaluation/loss_over_base"] is line["evaluation/loss_over_base_se"] is None
        )
        bins = [line[f"evaluation/loss_over_base_by_timestep/{number}"] for number in range(4)]
        assert [value is None for value in bins] == [False, True, False, False], "the others are as they were"
        assert line["evaluation/drift"] >= 0 and line["evaluation/kept"] is not None
        assert (
            line["evaluation/trained"]
            is line["evaluation/memorised_auc"]
            is line["evaluation/memorised_gap_se"]
            is None
        )
    [first] = json.loads((trainer.folder("run") / "validation_set.json").read_text())["images"][:1]
    of_images = "1 of 1 images have values that are not finite (NaN or infinity): 'a cat' (the VAE)"
    assert len([message for message in caplog.messages if message.startswith(of_images)]) == 2
    said = [message for message in caplog.messages if " validation losses" in message]
    assert len(said) == 4, "of the base and the run, at two steps"
    assert all(f" 1 of 16 ({first['name']} at timestep " in message for message in said)

    places.append((2, 3))
    assert trainer.train("run", {**SETTINGS, "train.steps": 2}) == 0, "with the results of before"
    record = read_record(trainer.folder("run"))
    assert record.evaluation is None and record.drift is not None
    assert any(
        "evaluation.parquet has values that are not finite at step 0, 1" in problem for problem in record.problems
    )
