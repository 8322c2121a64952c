"""The layers of the published models, and finding by them for which architecture an adapter file is, without any base."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping

from sushi_research.adapters.matching import Layer, Matches, Shape, layers_of, match_layers
from sushi_research.adapters.reading import Adapter
from sushi_research.errors import UserError
from sushi_research.models import ARCHITECTURES, Architecture, labels
from sushi_research.models.components import build_empty


def published_layers(architecture: str) -> dict[str, dict[str, Shape]]:
    """Component -> path -> shape of the weight, of each layer of a published model that an adapter can change.

    Linear [out, in], convolution [out, in, k, k], norm [channels]. Paths are those of diffusers and the installed transformers. The
    first call of a process takes about a second.
    """
    return {
        component: {path: layer.shape for path, layer in own.items()}
        for component, own in _layers(architecture).items()
    }


def locate(adapter: Adapter) -> tuple[Architecture, Matches]:
    """The architecture of an adapter file and the layer of each entry, by its names and shapes alone.

    UserError if it fits none of the published models, or several (as a file of one layer that they share).
    """
    found: dict[str, Matches] = {}
    refusals: list[str] = []
    for name, architecture in ARCHITECTURES.items():
        try:
            _, found[name] = match_published(adapter, name)
        except UserError as error:
            fault = re.split(": (?:give|take) ", str(error).removeprefix(f"{adapter.path}: "))[0]
            refusals.append(f"as {architecture.label}: {fault}")
    if not found:
        raise UserError(
            f"{adapter.path} fits neither {labels(' nor ')} ({'; '.join(refusals)}): give a file for one of these, or "
            "the base that it was trained on (convert_lora.py with --base)."
        )
    if len(found) > 1:
        raise UserError(
            f"{adapter.path} fits {labels(' and ')} alike, because it has only layers that they share: name its base "
            "(convert_lora.py has --base), or give a file with more layers."
        )
    [(name, matches)] = found.items()
    return ARCHITECTURES[name], matches


def match_published(adapter: Adapter, architecture: str) -> tuple[Architecture, Matches]:
    """`locate` for an architecture that is known. UserError if the file does not fit its published model."""
    known = ARCHITECTURES[architecture]
    layers_per_block = known.formats().SIZES["unet"]["layers_per_block"]
    return known, match_layers(adapter, known, _layers(architecture), layers_per_block)


@functools.cache
def _layers(architecture: str) -> Mapping[str, Mapping[str, Layer]]:
    formats = ARCHITECTURES[architecture].formats()
    components = ("unet", *formats.TEXT_ENCODERS)
    return {
        component: layers_of(build_empty(component, _config(formats.PUBLISHED[component], formats.SIZES[component])))
        for component in components
    }


def _config(facts: Mapping[str, object], sizes: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in facts.items() if key != "head_width"} | dict(sizes)
