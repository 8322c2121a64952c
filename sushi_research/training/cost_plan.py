"""The costs in a plan: FLOPs, peak memory and time of a micro-batch of each bucket, and the memory of what comes around the training.

The traces of planning/ take seconds for a real model, so what they found is remembered next to the caches.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from types import ModuleType
from typing import Any

import numpy as np
import psutil
import torch

from sushi_research.adapters import lora
from sushi_research.caches.keys import entry_key
from sushi_research.config.sets import sets_of
from sushi_research.errors import UserError, first_line
from sushi_research.models import loading
from sushi_research.models.components import build_empty
from sushi_research.planning import memory
from sushi_research.planning.memory import GIB, Held, Memory
from sushi_research.planning.step_cost import micro_batch_cost, vae_cost
from sushi_research.planning.step_trace import Cost, Shape
from sushi_research.precision import COMPUTE_DTYPES
from sushi_research.remembered import Remembered
from sushi_research.runs.job import Job

# Increment it when the traces count in another way.
_VERSION = 1
_LIBRARIES = ("torch", "diffusers", "peft")
# The pixels of a side that a latent pixel stands for.
_FACTOR = 8
# Buckets that are printed one by one; plan.json has all.
_SHOWN_BUCKETS = 6


class Unknown(Exception):
    """A cost that cannot be predicted; the message says why."""
