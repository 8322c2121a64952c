"""What a training has imported when its first step begins, and that every second until then is in a named stage."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from script_runs import ROOT

from benchmarking import first_step
from sushi_research.config.command_line import config_to_dict

pytestmark = pytest.mark.slow

# Each takes from a tenth of a second to several seconds, and is for something that this run does not do. The libraries themselves
# import some that no run needs, such as scipy's statistics.
UNUSED = {
    "wandb",
    "tensorboard",
    "torch.utils.tensorboard",
    "matplotlib",
    "datasets",  # writes new shards of the caches
    "torchvision",
    "xformers",
    "torchao",
    "sklearn",
    "skimage",
    "diffusers.pipelines",
}


@pytest.mark.parametrize("architecture", ["sd15"])
def test_a_training_imports_nothing_heavy_that_it_does_not_use(trainer, tmp_path: Path) -> None:
    trainer.train("fills-the-caches", {"train.steps": 1})
    settings, report = tmp_path / "settings.yaml", tmp_path / "report.json"
    settings.write_text(yaml.safe_dump(config_to_dict(trainer.config("measured", {"checkpoint.every": 100}))))
    command = [sys.executable, "-m", "benchmarking.traced_start", "script", str(report)]
    command += [str(ROOT / "scripts/train_sd15_lora.py"), "--config", str(settings)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert report.exists(), done.stderr
    assert "WARNING" not in done.stderr, "a library's notice is shown (run.quiet_libraries)"
    found = json.loads(report.read_text())
    assert "torch" in found["modules"] and "diffusers" in found["modules"]
    assert UNUSED & set(found["modules"]) == set()
    stages = [name for name, _, _ in found["stages"]]
    assert stages[:4] == ["starting", "planning", "caching", "loading"] and stages[-1] == "training"
    seconds = first_step.summary([found["stages"]])
    assert seconds["starting"] > 1, "the imports, from the start of the process"
    assert first_step.before_training(seconds) == pytest.approx(sum(seconds.values()) - seconds["training"])
