"""Compares the headers of a component's weight files with its config: whether it can be loaded is known before it is needed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sushi_research.errors import UserError
from sushi_research.models.components import build_empty
from sushi_research.models.header import Tensor, read_header
from sushi_research.models.single_file import DTYPES

# Names of the attention in VAEs that older versions of diffusers wrote, and their names today (diffusers renames them too).
RENAMED = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def require_fit(name: str, folder: Path, config: Mapping[str, Any], files: Iterable[Path]) -> None:
    """UserError unless `files`, of which only the headers are read, hold every parameter of the component `name` in `folder`.

    Surplus tensors are left to the loader, which knows those that a library wrote in earlier versions.
    """
    try:
        model = build_empty(name, config)
    except ValueError as error:
        raise UserError(f"{folder}/config.json is damaged ({error}): download the model again.") from None
    stored: dict[str, tuple[str, Tensor]] = {}
    for file in files:
        stored |= {_today(key): (key, tensor) for key, tensor in read_header(file).tensors.items()}
    wrong = []
    for parameter, value in model.named_parameters():
        key, tensor = stored.get(_today(parameter), (parameter, None))
        if tensor is None or tensor.shape != tuple(value.shape):
            wrong.append(key)
        elif tensor.dtype not in DTYPES:
            raise UserError(
                f"{folder} holds {tensor.dtype} weights ({key}), but only F16, BF16 and F32 can be read: use the model's fp16 "
                "files."
            )
    if wrong:
        raise UserError(
            f"the weights in {folder} do not fit its config.json ({len(wrong)} keys, the first {min(wrong)}): "
            "download the model again."
        )


def _today(name: str) -> str:
    """A tensor's name without the differences between versions of the libraries."""
    name = name.removeprefix("text_model.")
    for old, new in RENAMED.items():
        name = name.replace(old, new) if ".attentions." in name else name
    return name
