"""Loads adapter files of any trainer onto a base: every module at the scale that its file says, or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from sushi_research.adapters import bundled
from sushi_research.adapters.applying import Applied
from sushi_research.adapters.matching import Matches, architecture_of, match_modules
from sushi_research.adapters.reading import Adapter, read_adapter
from sushi_research.models import loading
from sushi_research.models.new_tokens import NewTokens
from sushi_research.models.storage import Storage
from sushi_research.models.tokenizers import folder_of


def load_pipeline(
    base: loading.Base,
    model: ModuleType,
    text: Any,
    dtype: torch.dtype,
    device: torch.device,
    storage: Storage = "compute",
) -> Any:
    """diffusers' pipeline of the base without its VAE and scheduler; for sampling, set `scheduler` (`sampling_scheduler`).

    `storage` is how its UNet is held.
    """
    import diffusers

    pipeline = getattr(diffusers, model.PIPELINE)(
        unet=loading.load_unet(base, dtype, device, storage=storage).eval(),
        vae=None,
        scheduler=None,
        **model.pipeline_text(base, text),
        **model.PIPELINE_WITHOUT,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_adapters(pipeline: Any, paths: Sequence[str | Path]) -> list[Applied]:
    """Puts adapter files on the pipeline, where each changes nothing until it is activated.

    UserError if a file cannot be read or does not fit the base fully.
    """
    loaded = []
    for path in paths:
        adapter = read_adapter(path)
        matches = match_modules(adapter, pipeline)
        components = {component: getattr(pipeline, component) for component in matches}
        loaded.append(Applied(adapter.path, components, matches, _new_tokens(adapter, pipeline)))
    return loaded


def _new_tokens(adapter: Adapter, pipeline: Any) -> list[NewTokens]:
    """The new tokens of a file on the pipeline's text encoders; UserError if they do not fit."""
    if not adapter.tokens:
        return []
    encoders = {name: getattr(pipeline, name) for name in architecture_of(pipeline).formats().TEXT_ENCODERS}
    bundled.require_fitting(
        adapter.path, adapter.tokens, {name: each.config.hidden_size for name, each in encoders.items()}
    )
    return [
        NewTokens(
            getattr(pipeline, folder_of(name)),
            encoder,
            {token: own[name] for token, own in adapter.tokens.items()},
        )
        for name, encoder in encoders.items()
    ]


def matches_of(pipeline: Any, path: str | Path) -> Matches:
    """Reads an adapter file and matches it with the base, without loading it; UserError as for `load_adapters`."""
    return match_modules(read_adapter(path), pipeline)
