"""Fixture for the tests of evaluation: a base with its UNet and filled caches, made once per architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


class Setting:
    """A base, its UNet, filled caches and the items of the photos, of one architecture."""

    def __init__(self, architecture: str, base: Path, photos: Path, root: Path) -> None:
        import torch
        from accelerate import Accelerator
        from script_runs import Trainer

        from sushi_research import models
        from sushi_research.caches.caches import open_caches, open_hash_cache, open_remembered
        from sushi_research.caches.inputs import Inputs, fill_caches
        from sushi_research.data.training_data import read_data
        from sushi_research.models import loading
        from sushi_research.runs.job import Job

        self.model, accelerator = models.load(architecture), Accelerator(cpu=True)
        config = Trainer(architecture, base, photos, root / "runs", root / "cache").config("evaluation")
        self.job = job = Job(config, self.model, accelerator, "fp32")
        hash_cache = open_hash_cache(config)
        self.base = loading.find_base(config, self.model)
        data = read_data(job, open_remembered(config))
        self.items = data.items
        self.caches = open_caches(job, self.base, hash_cache)
        self.inputs = Inputs(config, self.base, data, self.caches, hash_cache)
        fill_caches(job, self.inputs)
        self.unet = loading.load_unet(self.base, torch.float32, torch.device("cpu")).train()

    def validation_set(self, noise_samples: int = 4, prediction: Any = None, base_hash: str = "base") -> Any:
        from sushi_research.evaluation import validation_set
        from sushi_research.models.prediction import Prediction

        return validation_set.make_validation_set(
            self.items, noise_samples, self.caches, prediction or Prediction(), base_hash
        )

    def losses(self, val_set: Any, prediction: Any = None, **options: Any) -> Any:
        import torch

        from sushi_research.evaluation import validation_set
        from sushi_research.models.prediction import Prediction

        prediction, device = prediction or Prediction(), torch.device("cpu")
        return validation_set.losses(val_set, self.model, self.unet, self.caches, prediction, device=device, **options)


@pytest.fixture(scope="session")
def setting(bases, photos, tmp_path_factory):
    made = {}

    def make(architecture):
        if architecture not in made:
            root = tmp_path_factory.mktemp(f"evaluation_{architecture}")
            made[architecture] = Setting(architecture, bases[architecture], photos, root)
        return made[architecture]

    return make
