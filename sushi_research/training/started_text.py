"""The text encoders' part of the adapter file that a run starts from (`lora.start_from`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from sushi_research.adapters.bundled import Tokens
from sushi_research.adapters.entries import Entry
from sushi_research.adapters.targets import adaptable_paths, matching
from sushi_research.config import TrainingConfig
from sushi_research.config.text_encoders import endings
from sushi_research.errors import UserError, some
from sushi_research.models import loading
from sushi_research.training import started_settings
from sushi_research.training.text_encoders import names_trained

Entries = Mapping[str, Entry]


def empty_encoders(config: TrainingConfig, model: ModuleType, base: loading.Base) -> dict[str, Any]:
    """The text encoders of the base that the run trains, without weights."""
    return {name: loading.empty_text_encoder(base, name) for name in names_trained(config, model)}


def require_trained(
    config: TrainingConfig, path: Path, named: Mapping[str, Sequence[str]], encoders: Mapping[str, Any]
) -> None:
    """UserError if the file adapts a text encoder that the run does not train; `named` are its modules by component."""
    for component, names in named.items():
        if component == "unet" or component in encoders:
            continue
        if not config.text_encoders.train:
            raise UserError(
                f"{path} adapts the text encoders too ({names[0]:.200}), and only the UNet is trained: set "
                "text_encoders.train true, or start from a file without them."
            )
        raise UserError(
            f"{path} adapts the {component} ({names[0]:.200}), whose text_encoders.lr is 0 or which this base does not have: "
            "give it a learning rate, or start from a file without it."
        )


def require_usable(config: TrainingConfig, path: Path, component: str, entries: Entries, encoder: Any) -> None:
    """UserError unless the entries of a text encoder can be trained on, and are as the config has them where it says so."""
    own, adaptable = config.text_encoders, set(adaptable_paths(encoder, component))
    if strange := [layer for layer in entries if layer not in adaptable]:
        raise UserError(
            f"{path} adapts {strange[0]} of the {component}, which is not trained here (only layers of its blocks are): start "
            "from a file without it."
        )
    kind = started_settings.kind_of(path, entries, encoder)
    if kind != config.lora.kind:
        raise UserError(
            f"{path} holds the kind {config.lora.kind} for the UNet and {kind} for the {component}, and a run trains one: start "
            "from a file with one kind."
        )
    (rank, alpha), _ = Counter(map(started_settings.rank_and_alpha, entries.values())).most_common(1)[0]
    for key, given, of_file in (("rank", own.rank, rank), ("alpha", own.alpha, alpha)):
        if given is not None and abs(given - of_file) > 1e-3 * abs(of_file):
            raise UserError(
                f"text_encoders.{key} is {given:g}, and {path}, from which the run starts, has {key} {of_file:g} for the "
                f"{component}: remove text_encoders.{key}, or set it to null."
            )
    chosen = matching(endings(own.targets), list(adaptable))
    if own.targets != type(own).model_fields["targets"].default and chosen != set(entries):
        raise UserError(
            f"text_encoders.targets is {own.targets}, which are {len(chosen)} modules of the {component}, and {path}, from which "
            f"the run starts, adapts {len(entries)}: remove text_encoders.targets."
        )


def named_tokens(config: TrainingConfig, path: Path, tokens: Tokens) -> Tokens:
    """The file's new tokens under their names in the config, which must have all of them, and may have more; upper and lower case
    are alike. UserError otherwise."""
    given = {each.token.lower(): each for each in config.text_encoders.new_tokens}
    counts = {token: len(next(iter(own.values()))) for token, own in tokens.items()}
    found: Tokens = {}
    for token, own in tokens.items():
        each = given.get(token.lower())
        if each is None or each.vectors != counts[token]:
            wanted = some([f"{{token: {name:.60}, vectors: {count}}}" for name, count in counts.items()], 16)
            raise UserError(
                f"{path} holds the new token {token:.100} with {counts[token]} vectors, and text_encoders.new_tokens "
                f"{'does not name it' if each is None else f'gives it {each.vectors}'}: set text_encoders.new_tokens to "
                f"[{wanted}], or start from a file without new tokens."
            )
        if each.start_from is not None:
            raise UserError(
                f"text_encoders.new_tokens: the token {each.token} starts from {each.start_from!r}, and {path}, from which the run "
                "starts, has vectors for it: remove its start_from."
            )
        if not all(bool(torch.isfinite(vectors.float()).all()) for vectors in own.values()):
            raise UserError(
                f"{path} has values in the new token {token:.100} that fp32, in which they are trained, cannot hold: give another "
                "file."
            )
        found[each.token] = own
    return found
