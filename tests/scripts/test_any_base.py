"""The whole path through the real scripts, for every form that a base comes in: inspect, cache, train, draw.

A base in diffusers format and the same weights in a single file are one base: whatever comes of them is equal bit for bit.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from script_runs import Trainer, assert_equal, script
from single_files import narrow_base, write_single_file

from sushi_research.config.other_scripts import SamplingConfig

# One worker goes each path once, for all the tests that look at it.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("any_base")]

# v-prediction with zero-terminal SNR, as NoobAI-XL's file says it.
MARKERS = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
CASES = ["sd15-folder", "sd15-file", "sdxl-folder", "sdxl-file", "sdxl-v-folder", "sdxl-v-file"]
PICTURES = {"sample.enabled": True, "sample.prompts": ["a cat"], "sample.steps": 2, "sample.every": None}


@pytest.fixture(scope="module")
def forms(tmp_path_factory) -> dict[str, tuple[Path, dict[str, str]]]:
    """Each case's base, and the settings next to it; a folder and a file of one name hold the same weights (fp32)."""
    root = tmp_path_factory.mktemp("forms")
    found: dict[str, tuple[Path, dict[str, str]]] = {}
    for name in ("sd15", "sdxl", "sdxl-v"):
        architecture = name.removesuffix("-v")
        folder = narrow_base(root / name, architecture)
        if name.endswith("-v"):
            path = folder / "scheduler/scheduler_config.json"
            changes = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
            path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        extra = MARKERS if name.endswith("-v") else None
        file = write_single_file(folder, root / f"{name}.safetensors", architecture, dtype=torch.float32, extra=extra)
        found[f"{name}-folder"] = folder, {}
        found[f"{name}-file"] = file, {"tokenizers": str(folder)}
    return found


class Journey:
    """What came of one case: the run, its pictures and the grid, all through the scripts' `main`."""

    def __init__(self, case: str, form: tuple[Path, dict[str, str]], photos: Path, root: Path) -> None:
        base, overrides = form
        self.trainer = Trainer(case.split("-")[0], base, photos, root / "runs", root / "cache")
        self.changes: dict[str, Any] = {f"model.{key}": value for key, value in overrides.items()}
        self.changes |= {"loss.snr_gamma": 5.0, **PICTURES}
        assert script("cache_dataset").main(self.trainer.config("mine", self.changes)) == 0
        assert self.trainer.train("mine", self.changes) == 0
        self.run = self.trainer.folder("mine")
        sampling = {
            "prompts": ["a cat"],
            "steps": 2,
            "width": 64,
            "height": 64,
            "lora_scales": [1.0],
            "precision": "fp32",
        }
        grid = SamplingConfig(
            base=str(base),
            **overrides,
            **sampling,
            adapters=[str(self.run / "mine.safetensors")],
            output=str(root / "grid.png"),
        )
        assert script("sample").main(grid) == 0
        self.grid = {path.name: np.asarray(Image.open(path)) for path in sorted((root / "grid").iterdir())}

    def pictures(self) -> dict[str, np.ndarray]:
        return {
            str(path.relative_to(self.run)): np.asarray(Image.open(path)) for path in self.run.rglob("samples/*/*.png")
        }

    def metadata(self) -> dict[str, str]:
        with safe_open(self.run / "mine.safetensors", "pt") as file:
            return file.metadata()


@pytest.fixture(scope="module")
def paths(forms, photos, tmp_path_factory):
    """The path of a case, gone once."""
    made: dict[str, Journey] = {}

    def path(case: str) -> Journey:
        if case not in made:
            made[case] = Journey(case, forms[case], photos, tmp_path_factory.mktemp(case))
        return made[case]

    return path


def test_inspect_says_what_it_is(forms, capsys):
    for case in CASES:
        assert script("inspect_model").main(argparse.Namespace(model=str(forms[case][0]))) == 0
        lines = {line[:21].strip(): line[21:] for line in capsys.readouterr().out.splitlines() if line[0] != " "}
        assert lines["it is"].startswith("a Stable Diffusion 1.5 base" if "sd15" in case else "an SDXL base"), case
        assert lines["predicts"].startswith("v_prediction, zero-terminal SNR" if "-v-" in case else "epsilon"), case
        assert lines["missing"] == "nothing" and "F32" in lines["UNet"] and "F32" in lines["VAE"], case
        assert f"scripts/train_{case.split('-')[0]}_lora.py" in lines["train on it"], case


@pytest.mark.parametrize("case", CASES)
def test_the_whole_path(paths, case):
    path = paths(case)
    cache = path.trainer.plan("mine")["cache"]
    assert cache["images"]["missing"] == cache["captions"]["missing"] == 0, "cache_dataset.py filled them"
    assert all(np.isfinite(line["loss"]) for line in path.trainer.metrics("mine") if "loss" in line)
    assert any(tensor.any() for key, tensor in path.trainer.adapter("mine").items() if "lora_up" in key)
    # What the script draws from the adapter's file is what the run drew at its end.
    (last,) = [picture for name, picture in path.pictures().items() if "step-00000003/" in name]
    assert path.grid.keys() == {"00-00.png", "00-01.png"}
    assert np.abs(path.grid["00-01.png"].astype(int) - last).max() <= 1
    assert (path.grid["00-00.png"] != path.grid["00-01.png"]).any()


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sdxl-v"])
def test_a_single_file_trains_and_samples_as_its_folder_does(paths, name):
    folder, file = paths(f"{name}-folder"), paths(f"{name}-file")
    assert_equal(file.trainer.adapter("mine"), folder.trainer.adapter("mine"))
    assert_equal(file.trainer.metrics("mine"), folder.trainer.metrics("mine"))
    assert file.pictures().keys() == folder.pictures().keys() and len(file.pictures()) == 2
    for key, picture in folder.pictures().items():
        assert np.array_equal(file.pictures()[key], picture), key
    for key, picture in folder.grid.items():
        assert np.array_equal(file.grid[key], picture), key


def test_the_adapter_says_what_the_base_predicts(paths):
    usual, v = paths("sdxl-file").metadata(), paths("sdxl-v-file").metadata()
    assert usual["modelspec.prediction_type"] == "epsilon" and usual["ss_zero_terminal_snr"] == "False"
    assert v["modelspec.prediction_type"] == "v" and v["ss_zero_terminal_snr"] == "True"
    assert usual["ss_sd_model_name"] == "sdxl.safetensors", "the name of the file, not where it lies"


def test_v_prediction_is_another_training(paths):
    usual, v = paths("sdxl-file").trainer, paths("sdxl-v-file").trainer
    assert usual.metrics("mine")[0]["loss"] != v.metrics("mine")[0]["loss"]
    changed = [key for key, tensor in usual.adapter("mine").items() if not torch.equal(tensor, v.adapter("mine")[key])]
    assert len(changed) > len(usual.adapter("mine")) / 2


def test_a_run_does_not_go_on_as_another_prediction(paths, forms):
    """The same weights without their markers: the hashes are equal, what is learned is not."""
    path = paths("sdxl-v-file")
    unmarked = str(forms["sdxl-file"][0])
    with pytest.raises(ValueError, match="prediction"):
        path.trainer.train("mine", {**path.changes, "model.base": unmarked, "train.steps": 4})
    said = {"model.prediction_type": "v_prediction", "model.zero_terminal_snr": True}
    assert path.trainer.train("mine", {**path.changes, **said, "model.base": unmarked, "train.steps": 4}) == 0
