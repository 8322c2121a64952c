"""Training configs. The sections that all architectures share are in training.py; one file per architecture has the rest."""

from sushi_research.config.sd15 import SD15Training
from sushi_research.config.sdxl import SDXLTraining
from sushi_research.config.training import TrainingConfig

__all__ = ["SD15Training", "SDXLTraining", "TrainingConfig"]
