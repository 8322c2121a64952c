"""Loads adapter files of any trainer onto a base: every module at the scale that its file says, or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from sushi_research.adapters.applying import Applied
from sushi_research.adapters.matching import Matches, match_modules
from sushi_research.adapters.reading import read_adapter
from sushi_research.models import loading
from sushi_research.models.storage import Storage


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
        matches = matches_of(pipeline, path)
        loaded.append(Applied(Path(path), {component: getattr(pipeline, component) for component in matches}, matches))
    return loaded


def matches_of(pipeline: Any, path: str | Path) -> Matches:
    """Reads an adapter file and matches it with the base, without loading it; UserError as for `load_adapters`."""
    return match_modules(read_adapter(path), pipeline)
