"""An adapter file together with the layers that it changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from sushi_research.adapters import bundled
from sushi_research.adapters.entries import Entry
from sushi_research.adapters.matching import layers_of, match_components
from sushi_research.adapters.module_names import locate, match_published, published_layers
from sushi_research.adapters.reading import Adapter, read_adapter
from sushi_research.adapters.tools.base_weights import BaseWeights
from sushi_research.errors import UserError
from sushi_research.models import ARCHITECTURES

# Component -> layer path -> entry, or the shape of its weight.
Entries = Mapping[str, Mapping[str, Entry]]
Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Located:
    """`matches` are the entries of the file by component and layer; `shapes` are those of all layers' weights."""

    adapter: Adapter
    architecture: str
    matches: Entries
    shapes: Shapes
    layers_per_block: int

    @property
    def path(self) -> Path:
        """The file."""
        return self.adapter.path


def open_adapter(path: str | Path, base: BaseWeights | None = None, architecture: str | None = None) -> Located:
    """Reads an adapter file and finds its layers: in the base, or without one in the published model that they are of.

    `architecture` is that of the published model, if it is known: a file of a text encoder alone may fit several.

    UserError if the file cannot be read, or does not fit.
    """
    adapter = read_adapter(path)
    if base is None:
        found, matches = locate(adapter) if architecture is None else match_published(adapter, architecture)
        formats = found.formats()
        bundled.require_fitting(
            adapter.path, adapter.tokens, {name: formats.SIZES[name]["hidden_size"] for name in formats.TEXT_ENCODERS}
        )
        return Located(adapter, found.name, matches, published_layers(found.name), 2)
    matches = match_components(adapter, ARCHITECTURES[base.architecture], base.models())
    _require_tokens_fit(adapter, base)
    shapes = {
        name: {path: layer.shape for path, layer in layers_of(each.model).items()}
        for name, each in base.components.items()
    }
    return Located(adapter, base.architecture, matches, shapes, base.layers_per_block)


def _require_tokens_fit(adapter: Adapter, base: BaseWeights) -> None:
    """UserError unless the new tokens are as wide as those of the base."""
    if not adapter.tokens:
        return
    models = {name: base.models()[name] for name in ARCHITECTURES[base.architecture].formats().TEXT_ENCODERS}
    if lacking := [name for name, model in models.items() if model is None]:
        raise UserError(
            f"{adapter.path} holds new tokens, and {base.path} has no {lacking[0]}: give a base with its text encoders."
        )
    widths = {name: model.config.hidden_size for name, model in models.items()}
    bundled.require_fitting(adapter.path, adapter.tokens, widths)


def each_entry(matches: Entries) -> Iterator[tuple[str, str, Entry]]:
    """(component, layer path, entry) of all entries."""
    return ((component, path, entry) for component, entries in matches.items() for path, entry in entries.items())


def require_same(located: list[Located]) -> None:
    """UserError unless all adapters are for one architecture."""
    first = located[0]
    for other in located[1:]:
        if other.architecture != first.architecture:
            labels = [ARCHITECTURES[each.architecture].label for each in (first, other)]
            raise UserError(
                f"{first.path} is for {labels[0]} and {other.path} for {labels[1]}, so they have no layer in common: give adapters "
                "for one kind of base."
            )
