"""Checks an adapter file against a base: that every layer fits, and how much each weight would change."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sushi_research.adapters.kohya_format import require_whole
from sushi_research.adapters.tools import kept_tokens
from sushi_research.adapters.tools.base_weights import Weights
from sushi_research.adapters.tools.into_base import changed, changed_parameters
from sushi_research.adapters.tools.located import Located
from sushi_research.errors import UserError
from sushi_research.models import ARCHITECTURES
from sushi_research.models.components import TITLES
from sushi_research.progress import progress

# A layer whose weight changes by more than its own size is likely a mistake; a usual adapter changes it by a few per cent.
MUCH = 1.0


def verify(located: Located, weights: Weights) -> Iterator[tuple[str, str]]:
    """(title, text) of what was found. `located` was matched with the base, so its layers and their shapes fit.

    UserError if the tensors do not have the hash in the metadata, or a changed weight is not finite or overflows in fp16.
    """
    require_whole(located.path)
    hashed = "sshs_model_hash" in located.adapter.header.metadata
    yield "tensors", "as the hash in the metadata says" if hashed else "the metadata has no hash of them"
    label = ARCHITECTURES[weights.base.architecture].label
    for component, entries in located.matches.items():
        layers = len(located.shapes[component])
        yield "fits", f"{len(entries):,} of the {layers:,} layers of the {TITLES[component]} of this {label} base"
    if located.adapter.tokens:
        yield "new tokens", f"{kept_tokens.line(located.adapter.tokens)}, as wide as the base's"
    found = changed_parameters([(located, 1.0)])
    sizes, zeros = [], []
    for (component, parameter), entries in progress(found.items(), description="verifying", unit="tensor", leave=False):
        value = weights.get(component, parameter).float()
        new = changed(value, entries, parameter.endswith(".bias"))
        most = float(new.abs().max())
        if not most <= torch.finfo(torch.float16).max:
            raise UserError(
                f"{located.path}: with it {parameter} of the {TITLES[component]} has values up to {most:.3g}, which float16 cannot "
                "hold: give an adapter that was trained on this base."
            )
        size, change, where = float(value.norm()), float((new - value).norm()), f"{component}: {parameter}"
        if size:
            sizes.append((change / size, where))
        elif change:
            zeros.append((change, where))
    sizes.sort()
    if sizes:
        middle, (most, where) = sizes[len(sizes) // 2][0], sizes[-1]
        yield "change of weights", f"{middle:.2%} of a weight's norm in the middle, at most {most:.2%} ({where})"
    if zeros:  # as biases are at first
        most, where = max(zeros)
        yield "zero in the base", f"{len(zeros):,} of what it changes, up to a norm of {most:.3g} ({where})"
    if sizes and sizes[-1][0] > MUCH:
        yield (
            "note",
            "a weight that changes by more than its own size: such an adapter was likely made for another base",
        )
