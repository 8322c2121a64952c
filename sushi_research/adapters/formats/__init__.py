"""The naming schemes of adapter files, one module each: how a tensor's name says its component, its module and its part.

A name is `<prefix><module><ending>`. The prefix says the component (`lora_unet_`: the UNet), the ending the part
(`.lora_down.weight`: `down`), and the module is a path in the component, whose parts are joined by dots or underscores. Programs
mix prefixes and endings of several schemes in one file, so that the tables of all schemes are used together. Which layer of a model
a module is comes from spellings.py. writing.py writes two of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Naming(NamedTuple):
    """One scheme. `bare` are the first parts of modules of the UNet that have no prefix."""

    prefixes: Mapping[str, str]  # how a module's name begins -> the component
    endings: Mapping[str, str]  # how a tensor's name ends -> the part
    bare: tuple[str, ...] = ()


class Place(NamedTuple):
    """The place of a tensor: the module's name in the file, and the part of the module's entry that the tensor is."""

    module: str
    part: str
