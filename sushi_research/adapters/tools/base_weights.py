"""The weights of a base that an adapter changes, in diffusers format or in a single file: where each is, and reading one at a time.

Of the base only the UNet and the text encoders are looked at: its VAE, tokenizers and scheduler do not matter here.
"""

from __future__ import annotations

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
from sushi_research.models.single_file import SingleFile
from sushi_research.user_files import readable

Tensor = torch.Tensor
# Bytes that are copied at once.
PIECE = 1 << 24
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


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


class TensorFile:
    """Reads the tensors of a safetensors file one at a time. The file is not mapped into memory, where a whole base would count as
    the process's."""

    def __init__(self, path: Path) -> None:
        self.header = read_header(path)
        self._file = open(path, "rb")

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def get(self, name: str) -> Tensor:
        """A tensor in memory of its own."""
        entry = self.header.tensors[name]
        if entry.begin == entry.end:
            return torch.empty(entry.shape, dtype=_DTYPES[entry.dtype])
        self._file.seek(entry.begin)
        data = bytearray(entry.end - entry.begin)
        self._require(self._file.readinto(data), len(data))
        return torch.frombuffer(data, dtype=_DTYPES[entry.dtype]).view(entry.shape)

    def pieces(self, name: str) -> Iterator[bytes]:
        """The bytes of a tensor of any dtype, in pieces."""
        entry = self.header.tensors[name]
        self._file.seek(entry.begin)
        for at in range(entry.begin, entry.end, PIECE):
            piece = self._file.read(min(PIECE, entry.end - at))
            self._require(len(piece), min(PIECE, entry.end - at))
            yield piece

    def _require(self, found: int, wanted: int) -> None:
        if found != wanted:
            raise UserError(f"{self.header.path} was cut short while it was read: take a whole copy.")


def view_of(stored: Tensor, place: Place, shape: tuple[int, ...]) -> Tensor:
    """The part of a tensor of a file that is a parameter of this shape, which a single file may have with ones at the end of its
    shape. Writing to it changes `stored`."""
    rows = shape[0]
    part = stored if place.third is None else stored[place.third * rows : (place.third + 1) * rows]
    return part.T if place.transposed else part.view(shape)


class Weights:
    """Reads parameters of a base, one at a time, within a `with` block."""

    def __init__(self, base: BaseWeights) -> None:
        self.base = base
        self._files: dict[Path, TensorFile] = {}

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._files.values():
            file.close()

    @readable()
    def file(self, path: Path) -> TensorFile:
        """A file of the base, opened."""
        if path not in self._files:
            self._files[path] = TensorFile(path)
        return self._files[path]

    @readable()
    def get(self, component: str, parameter: str) -> Tensor:
        """A parameter in its shape in the model and its dtype in the file. UserError if it cannot be read or is not finite."""
        path, place = self.base.components[component].places[parameter]
        stored = self.file(path).get(place.name)
        value = view_of(stored, place, self.base.shape(component, parameter))
        require_finite(value, place.name, str(path))
        return value
