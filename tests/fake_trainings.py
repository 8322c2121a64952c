"""Stand-ins for trainings of an experiment: a small program that saves when it is asked to stop, and the work on it."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from sushi_research.experiments.experiment_file import Experiment
from sushi_research.experiments.run_work import RunWork

# It runs until it is asked to stop, and then saves and ends; launched again, it finishes.
TRAINING = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
def save(*_):
    (folder / "checkpoints/step-00000004").mkdir(parents=True)
    print("saved", flush=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
(folder / "gpus").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
if (folder / "checkpoints").is_dir():
    print("finished")
    sys.exit(0)
(folder / "begun").touch()
time.sleep(60)
"""


def work_of(tmp_path: Path, code: str = TRAINING, **options) -> RunWork:
    folder = tmp_path / "runs/one"
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", code, str(folder)]
    return RunWork("one", folder, tmp_path / "runs/logs", command, None, **options)


def wait_for(path: Path) -> None:
    until = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < until, f"{path} does not come"
        time.sleep(0.02)


def experiment_of(tmp_path: Path, **options) -> Experiment:
    return Experiment(
        title="t",
        script="scripts/train_sd15_lora.py",
        configs=["base.yaml"],
        variants={"a": {}},
        folder=str(tmp_path / "runs"),
        **options,
    )
