"""The supported architectures: one table for tools, and the modules that it names.

Importing this package imports neither torch nor any module in the table. A training script imports its module directly
(`from sushi_research.models import sdxl as model`); tools that serve every architecture use the table.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any, NamedTuple


class Architecture(NamedTuple):
    """One architecture. The names of its modules and of its script are derived from `name`."""

    name: str
    label: str  # short name for users
    title: str  # full name with its article
    config: str  # dotted path of the config class of its training script

    @property
    def script(self) -> str:
        """Path of its training script."""
        return f"scripts/train_{self.name}_lora.py"

    @property
    def module(self) -> str:
        """Dotted path of its model module, which imports torch."""
        return f"{__name__}.{self.name}"

    def config_class(self) -> Any:
        """The config class of its training script. Does not import torch."""
        module, _, name = self.config.rpartition(".")
        return getattr(importlib.import_module(module), name)

    def formats(self) -> ModuleType:
        """Its module in `models/formats/`: how it is recognised and stored. Does not import torch."""
        return importlib.import_module(f"{__name__}.formats.{self.name}")


ARCHITECTURES = {
    each.name: each
    for each in (
        Architecture("sd15", "SD1.5", "a Stable Diffusion 1.5", "sushi_research.config.sd15.SD15Training"),
        Architecture("sdxl", "SDXL", "an SDXL", "sushi_research.config.sdxl.SDXLTraining"),
    )
}


def load(name: str) -> ModuleType:
    """The model module of an architecture: `load("sd15")` is `sushi_research.models.sd15`."""
    return importlib.import_module(ARCHITECTURES[name].module)


def config_classes() -> dict[str, Any]:
    """The config class of each architecture's training script, by name."""
    return {name: each.config_class() for name, each in ARCHITECTURES.items()}


def name_of(config: Any) -> str:
    """The architecture whose training script uses this config's class, or the nearest class that it derives from."""
    names = {kind: name for name, kind in config_classes().items()}
    return next(names[kind] for kind in type(config).__mro__ if kind in names)


def labels(joint: str = " or ") -> str:
    """The supported architectures as text for messages: "SD1.5 or SDXL"."""
    *most, last = (each.label for each in ARCHITECTURES.values())
    return joint.join([", ".join(most), last] if most else [last])
