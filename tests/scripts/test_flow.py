"""A base that predicts a rectified flow, through the scripts: training, evaluation, samples, and going on where a run stopped."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from script_runs import Trainer, script
from test_resume import Killed, assert_same_result, at_micro_batch, kill

from sushi_research.config.other_scripts import SamplingConfig
from sushi_research.errors import UserError
from sushi_research.evaluation.results import Results
from sushi_research.reports.model_card import model_card
from sushi_research.runs.run_folder import RunFolder
from testing.tiny_base import save_tiny_base

SETTINGS = {
    "optimizer.lr": 0.02,
    "lora.save_dtype": "float32",
    "loss.snr_gamma": 5.0,
    "evaluation.held_out": 0.2,
    "evaluation.every": None,
    "evaluation.noise_samples": 4,
    "evaluation.drift_captions": ["a cat"],
    "sample.enabled": True,
    "sample.prompts": ["a cat"],
    "sample.every": None,
    "sample.steps": 2,
}


@pytest.fixture
def trainer(photos, caches, tmp_path) -> Trainer:
    base = save_tiny_base(tmp_path / "base", "sd15", flow_shift=3.0)
    return Trainer("sd15", base, photos, tmp_path / "runs", caches)


def test_the_whole_path(trainer, bases, tmp_path, capsys):
    assert trainer.train("whole", SETTINGS) == 0
    assert "predicts rectified_flow, shift 3\n" in capsys.readouterr().out
    with at_micro_batch(trainer, 3, 0, kill), pytest.raises(Killed):
        trainer.train("stopped", SETTINGS)
    assert trainer.train("stopped", SETTINGS) == 0
    assert_same_result(trainer, "stopped", "whole")
    lines = [line for line in trainer.metrics("whole") if "loss" in line]
    assert len(lines) == 3 and all(np.isfinite(line["loss"]) for line in lines)
    for name in ("evaluation", "drift"):
        found = Results(trainer.folder("whole") / f"{name}.parquet").arrays()
        assert found.steps == (0, 3) and np.isfinite(found.loss).all()
        assert (found.loss[1] != found.loss[0]).all(), f"{name}: the adapter changes what is measured"

    base = trainer.plan("whole")["base"]
    assert (base["prediction_type"], base["flow_shift"]) == ("rectified_flow", 3.0)
    with safe_open(trainer.folder("whole") / "whole.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.prediction_type"] == "rectified_flow" and metadata["sushi_research.flow_shift"] == "3.0"

    # sample.py draws from the file what the run drew at its end.
    grid = SamplingConfig(
        adapters=[str(trainer.folder("whole"))], prompts=["a cat"], steps=2, width=64, height=64, lora_scales=[1.0]
    )
    grid = grid.model_copy(update={"precision": "fp32", "output": str(tmp_path / "grid.png")})
    assert script("sample").main(grid) == 0
    [drawn] = trainer.folder("whole").glob("samples/step-00000003/*.png")
    with Image.open(drawn) as one, Image.open(tmp_path / "grid/00-01.png") as other:
        # The adapter is added to the weights there, and to the outputs here: a pixel may be rounded to the next value.
        assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1

    card = model_card(
        RunFolder(trainer.folder("whole"), None), trainer.folder("whole") / "whole.safetensors", "me/whole"
    ).text
    assert "ModelSamplingSD3, for example with the shift 3 " in card and "use_flow_sigmas=True, flow_shift=3.0)" in card

    # The base may say nothing, and the adapter knows.
    other = {"lora.start_from": str(trainer.folder("whole") / "whole.safetensors"), "model.base": str(bases["sd15"])}
    capsys.readouterr()
    assert trainer.train("started", {"train.steps": 1, **other}) == 0
    assert "trained on predicts rectified_flow, and this base is taken to predict epsilon" in capsys.readouterr().out

    # Another shift is another training.
    with pytest.raises(UserError, match="prediction"):
        trainer.train("whole", SETTINGS | {"model.flow_shift": 2.0, "train.steps": 4})
