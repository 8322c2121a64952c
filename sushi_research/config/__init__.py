"""The config of a training. What all architectures share is in training.py; each has a file for what differs."""

from sushi_research.config.sd15 import SD15Training
from sushi_research.config.sdxl import SDXLTraining
from sushi_research.config.training import TrainingConfig

__all__ = ["SD15Training", "SDXLTraining", "TrainingConfig"]
