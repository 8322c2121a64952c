"""Prompts with settings of their own, from a file: a run and scripts/sample.py generate the same images from it."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from script_runs import Trainer, script

from sushi_research.config.other_scripts import SamplingConfig

# The tiny base has one token per byte, so this prompt has three chunks.
LONG = "a cat " * 30
PROMPTS = f"""\
- {{prompt: a cat, negative_prompt: dark, seed: 3, width: 32, height: 64, steps: 1, guidance: 2.0}}
- {LONG}
- prompt: a cat
  scale: 0
"""
NAMES = ["00-seed3.png", "01-seed0.png", "02-seed0.png"]
LABELS = [
    "a cat (seed 3, 32x64, steps 1, guidance 2, negative: dark)",
    f"{LONG.strip()} (seed 0)",
    "a cat (seed 0, scale 0)",
]


def picture(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


@pytest.mark.parametrize("architecture", ["sd15"])
def test_a_run_and_sample_py_draw_the_same_from_a_file(trainer: Trainer, bases, tmp_path):
    (tmp_path / "prompts.yaml").write_text(PROMPTS)
    sample = {"enabled": True, "every": None, "steps": 2, "width": 64, "height": 48}
    sample |= {"prompts_file": str(tmp_path / "prompts.yaml")}
    changes = {f"sample.{key}": value for key, value in sample.items()}
    assert trainer.train("drawn", changes | {"train.steps": 1, "optimizer.lr": 0.1, "lora.targets": "attention"}) == 0
    folder = trainer.folder("drawn")
    base, trained = ([picture(folder / f"samples/step-{step:08d}" / name) for name in NAMES] for step in (0, 1))
    assert [image.shape for image in trained] == [(64, 32, 3), (48, 64, 3), (48, 64, 3)]
    assert np.array_equal(base[2], trained[2]), "a LoRA scale of 0 is the base"
    changed = [np.abs(base[row] - trained[row]).mean() for row in range(2)]
    assert min(changed) > 1
    for name, label in zip(NAMES, LABELS, strict=True):
        with Image.open(folder / "samples/step-00000001" / name) as image:
            assert image.info["prompt"] == label

    [adapter] = folder.glob("*.safetensors")
    settings = {
        "base": str(bases["sd15"]),
        "adapters": [str(adapter)],
        "lora_scales": [1.0],
        "output": str(tmp_path / "grid.png"),
    }
    settings |= {key: sample[key] for key in ("steps", "width", "height", "prompts_file")}
    assert script("sample").main(SamplingConfig(**settings)) == 0
    for row in range(3):
        # The run's text comes from an fp16 cache, and the file has the adapter in fp16.
        tolerance = 0.1 * min(changed)
        assert np.abs(picture(tmp_path / f"grid/{row:02d}-00.png") - base[row]).mean() < tolerance
        assert np.abs(picture(tmp_path / f"grid/{row:02d}-01.png") - trained[row]).mean() < tolerance
