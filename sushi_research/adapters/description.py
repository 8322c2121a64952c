"""Describes an adapter file for `scripts/inspect_model.py` and `scripts/convert_lora.py`: modules, kinds, ranks, scales, hash."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from sushi_research.adapters.chosen_step import chosen_step
from sushi_research.adapters.entries import Difference, title_of
from sushi_research.adapters.metadata import started_from
from sushi_research.adapters.reading import component_of, read_adapter
from sushi_research.errors import printable
from sushi_research.models.components import TITLES

# The metadata in which trainers name the kind of base.
BASES = ("ss_base_model_version", "modelspec.architecture")


def describe(path: Path) -> Iterator[tuple[str, str]]:
    """(title, text) of each line about an adapter file. UserError for a file that cannot be used."""
    adapter = read_adapter(path)
    entries, header = adapter.entries, adapter.header
    yield "file", f"{printable(path.name)}, {path.stat().st_size / 2**20:.1f} MiB, {len(header.tensors):,} tensors"
    yield "it is", "a LoRA (adapter) file: give it to scripts/sample.py or scripts/evaluate.py with --adapters"
    said = [f"{key} = {printable(header.metadata[key]):.100}" for key in BASES if key in header.metadata]
    yield "trained on", ", ".join(said) or "unknown (its metadata does not say it)"
    if chain := started_from(header):
        yield (
            "started from",
            ", then ".join(printable(f"{each.name} ({each.steps or 'unknown'} steps)") for each in chain),
        )
    if chosen := chosen_step(path):
        yield "chosen", printable(chosen.describe())
    yield "modules", _counts(TITLES[component_of(entry.name)] for entry in entries)
    yield "kind", _counts(title_of(entry) for entry in entries)
    ranked = [entry for entry in entries if not isinstance(entry, Difference)]
    if ranked:
        yield "rank", _counts("full" if entry.rank is None else str(entry.rank) for entry in ranked)
        yield "scale (alpha / rank)", _counts(f"{entry.scale:g}" for entry in ranked)
    for token, vectors in adapter.tokens.items():
        count = len(next(iter(vectors.values())))
        yield "new token", f"{printable(token)}, {count} vector{'' if count == 1 else 's'} in each text encoder"
    yield "dtypes", _counts(tensor.dtype for tensor in header.tensors.values())
    for note in adapter.notes:
        yield "note", printable(note.removeprefix(f"{path} "))
    with open(path, "rb") as file:
        yield "sha256", hashlib.file_digest(file, "sha256").hexdigest()


def _counts(values: Iterable[str]) -> str:
    """Each distinct value, the most frequent first, with the number of times that it occurs: "4 (128), 2 (8)"."""
    return ", ".join(f"{value} ({count:,})" for value, count in Counter(values).most_common())
