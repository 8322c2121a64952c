"""Describes an adapter file: what it holds, how large its changes are by block, its metadata and its history."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sushi_research.adapters import description
from sushi_research.adapters.tools import history, spectrum
from sushi_research.adapters.tools.base_weights import Weights
from sushi_research.adapters.tools.located import open_adapter
from sushi_research.errors import UserError, printable
from sushi_research.models.header import read_header

# Entries of the metadata that are shown elsewhere, and letters of each of the others.
_SHOWN = (history.KEY, *description.BASES)
MOST_LETTERS = 100


def describe(
    path: Path, weights: Weights | None = None, facts: list[spectrum.LayerFacts] | None = None
) -> Iterator[tuple[str, str]]:
    """(title, text) of each line about an adapter file; the facts about its layers are added to `facts`.

    UserError for a file that cannot be used, or, with the weights of a base, for one that does not fit it.
    """
    yield from description.describe(path)
    header = read_header(path)
    for key, value in sorted(header.metadata.items()):
        if key not in _SHOWN:
            more = f"... ({len(value):,} letters)" if len(value) > MOST_LETTERS else ""
            yield "metadata", f"{printable(key):.100} = {printable(value[:MOST_LETTERS])}{more}"
    for each in history.steps_of(header):
        yield "history", history.describe(each)
    try:
        located = open_adapter(path, weights and weights.base)
    except UserError as error:
        if weights:
            raise
        yield "note", f"norms by block are not computed: {error}"
        return
    found = spectrum.facts_of(located, weights)
    yield from spectrum.lines(found)
    if len(found) < sum(map(len, located.matches.values())):
        yield (
            "note",
            "the change of a DoRA depends on the weights of the base: give it to see its norms (convert_lora.py inspect --base)",
        )
    if facts is not None:
        facts.extend(found)
