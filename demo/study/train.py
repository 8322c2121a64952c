"""Trains one recipe of the study and keeps its adapter after each number of steps.

python -m demo.study.train star plain      # continues where it was interrupted
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from typing import Any

from demo.study.recipes import ROOT, SETTINGS, Setting, photos, recipes
from sushi_research.runs.run_folder import RunFolder


def adapter_path(setting: Setting, recipe: str, steps: int) -> Path:
    """Where the adapter of a recipe after `steps` steps is kept."""
    return setting.folder / "adapters" / f"{recipe}-{steps:03d}.safetensors"


def train(setting: Setting, recipe: str) -> None:
    """Trains a recipe to each of the setting's numbers of steps in turn, as the same command with more steps does."""
    changed = dict(recipes(setting)[recipe])
    which = changed.pop("photos", "all")
    missing = [steps for steps in setting.steps if not adapter_path(setting, recipe, steps).exists()]
    if not missing:
        return
    folder = photos(setting, which)
    script = load_script(setting.architecture)
    for steps in missing:
        settings = {
            **changed,
            "data.path": str(folder),
            "train.steps": steps,
            "checkpoint.every": None,
            "sample.enabled": False,
            "sample.prompts": [],
            "tracking.wandb": "off",
            "cache.folder": str(setting.folder / "cache"),
            "run.folder": str(setting.folder / "runs"),
            "run.name": recipe,
        }
        if status := script.main(config_of(script, setting, settings)):
            sys.exit(status)
        path = adapter_path(setting, recipe, steps)
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(RunFolder(setting.folder / "runs" / recipe, None).adapter, path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)


def load_script(architecture: str) -> Any:
    """The training script as a module."""
    path = ROOT / f"scripts/train_{architecture}_lora.py"
    specification = importlib.util.spec_from_file_location(path.stem, path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def config_of(script: Any, setting: Setting, settings: dict[str, Any]) -> Any:
    """The config of a training script: the demo's of the concept, with `settings` on it."""
    from sushi_research.config.command_line import load_config
    from sushi_research.experiments.experiment import written
    from sushi_research.models import ARCHITECTURES

    configs = [ROOT / f"configs/demo_{setting.architecture}.yaml", ROOT / f"configs/demo/{setting.concept}.yaml"]
    arguments = [word for config in configs for word in ("--config", str(config))]
    arguments += [f"--{key}={written(value)}" for key, value in settings.items()]
    kind = ARCHITECTURES[setting.architecture].config_class()
    return load_config(kind, arguments, script=script.__file__, intro="\n".join("12345"))


if __name__ == "__main__":
    name, recipe = sys.argv[1:]
    train(next(setting for setting in SETTINGS if setting.name == name), recipe)
