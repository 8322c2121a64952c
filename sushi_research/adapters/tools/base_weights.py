"""The weights of a base that an adapter changes, in diffusers format or in a single file: where each is, and reading one at a time.

Of the base only the UNet and the text encoders are looked at: its VAE, tokenizers and scheduler do not matter here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sushi_research.errors import UserError
from sushi_research.models import ARCHITECTURES, hub, settings, sources
from sushi_research.models.components import build_empty, require_finite
from sushi_research.models.diffusers_folder import FolderPart, stem
from sushi_research.models.folder_weights import index_file, keys_by_file
from sushi_research.models.header import read_header
from sushi_research.models.original_names import Place
from sushi_research.models.single_file import SingleFile, read
from sushi_research.user_files import readable

Tensor = torch.Tensor


@dataclass(frozen=True)
class Component:
    """The UNet or a text encoder of a base: `model` has its layers, without weights; `places` are those of its parameters."""

    part: sources.Part
    model: Any = field(repr=False)
    places: dict[str, tuple[Path, Place]] = field(repr=False)


@dataclass(frozen=True)
class BaseWeights:
    """A base: `source` as the user named it, `path` its folder or file."""

    source: str
    path: Path
    architecture: str
    variant: str | None
    components: dict[str, Component]

    @property
    def layers_per_block(self) -> int:
        """Of the UNet's config: names in adapter files depend on it."""
        return self.components["unet"].model.config.layers_per_block

    def models(self) -> dict[str, Any]:
        """Component -> its model without weights, as `match_components` takes it; None for what the base has not."""
        return {name: each.model for name, each in self.components.items()} | {
            name: None for name in ("text_encoder", "text_encoder_2") if name not in self.components
        }

    def shape(self, component: str, parameter: str) -> tuple[int, ...]:
        """The shape of a parameter."""
        return tuple(self.components[component].model.get_parameter(parameter).shape)


@readable()
def open_base(source: str, variant: str | None = None) -> BaseWeights:
    """Opens a base (a folder in diffusers format, a single file, or a hub id of either) by its configs and headers.

    A single file may lack text encoders. UserError if it is no base that is supported, or its weights do not fit its configs.
    """
    path, commit = hub.locate_base(source, None, "the base")
    # What the model predicts does not matter here, so a folder may be without a scheduler.
    opened = sources.open_folder(path, variant, "epsilon") if path.is_dir() else sources.open_file(read_header(path))
    names = [*ARCHITECTURES[opened.architecture].formats().TEXT_ENCODERS, "unet"]
    if commit is not None and path.is_dir():
        hub.fetch_weights(source, commit, variant, names)
    parts: dict[str, sources.Part] = {}
    for name in names:
        if isinstance(opened.single, SingleFile) and name not in opened.single and name != "unet":
            continue
        parts[name] = opened.part(name, parts)
        settings.require(name, parts[name].config, opened.architecture, parts[name].config_where)
    components = {name: _component(name, part) for name, part in parts.items()}
    return BaseWeights(source, path, opened.architecture, variant, components)


def _component(name: str, part: sources.Part) -> Component:
    try:
        model = build_empty(name, part.config)
    except ValueError as error:
        raise UserError(
            f"the config of {part.where} describes no {name} ({error}): download the model again."
        ) from error
    if isinstance(part, FolderPart):
        index = index_file(part.folder, stem(name), part.variant)
        found = keys_by_file(model, part.folder, part.files, index)
        places = {parameter: (file, Place(key)) for file, keys in found.items() for key, parameter in keys.items()}
    else:
        places = {parameter: (part.header.path, place) for parameter, place in part.places.items()}
    return Component(part, model, places)


class Weights:
    """Reads parameters of a base, one at a time, within a `with` block."""

    def __init__(self, base: BaseWeights) -> None:
        self.base = base
        self._stack = contextlib.ExitStack()
        self._files: dict[Path, Any] = {}

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def get(self, component: str, parameter: str) -> Tensor:
        """A copy of a parameter in its shape in the model and its dtype in the file. UserError if it cannot be read or is not
        finite."""
        path, place = self.base.components[component].places[parameter]
        with _reading(path):
            if path not in self._files:
                from safetensors import safe_open

                self._files[path] = self._stack.enter_context(safe_open(path, "pt"))
            value = read(self._files[path], place, self.base.shape(component, parameter)).clone()
        require_finite(value, place.name, str(path))
        return value


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} could not be read ({error}): download the file again.") from error
