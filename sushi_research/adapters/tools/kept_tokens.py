"""The new tokens of adapter files in what the tools write: they stay as they are, or the tool refuses."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sushi_research.adapters import bundled
from sushi_research.adapters.formats.writing import Layout
from sushi_research.adapters.tools.located import Located, require_same
from sushi_research.errors import UserError, some

WITHOUT = "a copy without them (docs/new_tokens.md shows how to make one)"


def kept(located: Sequence[Located], layout: Layout) -> bundled.Tokens:
    """The new tokens of all files. UserError if the layout has no place for them, or two files have other vectors for one token."""
    require_same([*located])
    found: bundled.Tokens = {}
    owners: dict[str, tuple[str, Located]] = {}  # by the word in lower case, which is how the tokenizer reads it
    for each in located:
        tokens = each.adapter.tokens
        if tokens and layout != "kohya":
            raise UserError(
                f"{each.path} holds new tokens ({some([*tokens])}), for which peft's layout has no place: write kohya's layout, or "
                f"convert {WITHOUT}."
            )
        for token, own in tokens.items():
            name, owner = owners.setdefault(token.lower(), (token, each))
            if owner is each:
                found[token] = own
            elif not all(_equal(own[encoder], vectors) for encoder, vectors in found[name].items()):
                raise UserError(
                    f"{owner.path} and {each.path} hold different vectors of the new token {name:.100}, and a file has one: give "
                    f"one of them as {WITHOUT}."
                )
    total = sum(len(next(iter(own.values()))) for own in found.values())
    if total > bundled.MOST_VECTORS:
        raise UserError(
            f"the adapters hold new tokens with {total:,} vectors together, and a file at most {bundled.MOST_VECTORS:,}: give "
            "fewer adapters."
        )
    return found


def require_none(located: Sequence[Located]) -> None:
    """UserError if a file has new tokens, for which the weights of a base have no place."""
    for each in located:
        if each.adapter.tokens:
            raise UserError(
                f"{each.path} holds new tokens ({some([*each.adapter.tokens])}), for which a base has no place: merge {WITHOUT}, "
                "and use the tokens' own files (NAME-TOKEN.safetensors) with the merged base."
            )


def line(tokens: bundled.Tokens) -> str:
    """For people: "mycat (2 vectors), <style> (1 vector)"."""
    counts = {token: len(next(iter(own.values()))) for token, own in tokens.items()}
    return some([f"{token} ({count} vector{'' if count == 1 else 's'})" for token, count in counts.items()], 6)


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.double(), other.double())
