"""Loads adapter files of any trainer onto a base: every module at the scale that its file says, or not at all."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from sushi_research.adapters.matching import Matches, match_modules, require_loaded
from sushi_research.adapters.reading import Pair, read_adapter
from sushi_research.errors import UserError
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


def load_adapters(pipeline: Any, paths: Sequence[str]) -> list[str]:
    """Loads the adapter files; returns the name of each in the pipeline.

    The pairs go to diffusers and transformers by their layers' paths, because their own readers give modules whose rank or alpha
    differs from the others a wrong scale. UserError if a file cannot be read or does not fit the base fully.
    """
    import diffusers.utils.logging

    # diffusers logs a line for a component without adapter layers, which is no fault.
    diffusers.utils.logging.set_verbosity(logging.CRITICAL)
    # peft warns when several adapters are loaded, which is intended here.
    warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
    names = []
    for number, path in enumerate(paths):
        name = f"adapter_{number}"
        matches = matches_of(pipeline, path)
        for component, pairs in matches.items():
            _load(getattr(pipeline, component), name, pairs, path)
        require_loaded(pipeline, name, matches, path)
        names.append(name)
    return names


def matches_of(pipeline: Any, path: str | Path) -> Matches:
    """Reads an adapter file and matches it with the base, without loading it; UserError as for `load_adapters`."""
    return match_modules(read_adapter(path), pipeline)


def _load(component: Any, name: str, pairs: dict[str, Pair], path: str) -> None:
    """Adds the pairs to the layers of one component of the pipeline, and sets their scales."""
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig

    state = {}
    for where, pair in pairs.items():
        state[f"{where}.lora_A.weight"] = _cast(pair.down, component.dtype, pair, path)
        state[f"{where}.lora_B.weight"] = _cast(pair.up, component.dtype, pair, path)
    if isinstance(component, UNet2DConditionModel):
        component.load_lora_adapter(state, prefix=None, adapter_name=name)
    else:
        ranks = {f"^{re.escape(where)}": pair.rank for where, pair in pairs.items()}
        config = LoraConfig(r=max(ranks.values()), target_modules=list(pairs), rank_pattern=ranks)
        component.load_adapter(adapter_name=name, adapter_state_dict=state, peft_config=config)
    for where, pair in pairs.items():
        layer = component.get_submodule(where)
        # The LoRA scale that is set later multiplies alpha / rank.
        layer.lora_alpha[name] = pair.alpha
        layer.set_scale(name, 1.0)


def _cast(tensor: torch.Tensor, dtype: torch.dtype, pair: Pair, path: str) -> torch.Tensor:
    """The matrix in the dtype of the component; UserError if a value overflows (fp16's maximum is 65,504)."""
    cast = tensor.to(dtype)
    if not torch.isfinite(cast).all():
        advice = "set precision to bf16 or fp32" if dtype == torch.float16 else "take another copy of the adapter"
        raise UserError(
            f"{path} has values up to {tensor.double().abs().max():.3g} in {pair.name}, which "
            f"{str(dtype).removeprefix('torch.')} cannot hold: {advice}."
        )
    return cast
