"""Removes what a data set does not need from the caches: entries, damaged shards, and what killed writers left.

A shard is never changed. The entries that stay of it are written to a new shard first, and then the old one is removed. So a kill
at any moment loses no entry that is needed. It needs the store for itself (`Store.alone`): a command that reads from a shard would
not find it any more.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sushi_research.caches.inputs import Inputs
from sushi_research.caches.keys import hex_digits
from sushi_research.caches.shards import make_row, write_shard
from sushi_research.caches.store import Store
from sushi_research.files import remove, size_text, writing
from sushi_research.progress import progress

_SHARD_BYTES = 256 * 2**20
_HOUR = 3600
_STORE = re.compile(r"latents|masks|(text|generated)_\w+")
_OURS = re.compile(r"shard-[0-9a-f]{32}\.(arrow|json)(\.damaged)?")


@dataclass(frozen=True)
class Waste:
    """What a store has that is not needed: `entries` of it, and rows that another shard has too, `bytes` of shards in all.

    `kept` are, for each shard that has such rows, its name and the keys [k] of PACKED of the rows that stay.
    """

    store: Store
    kept: dict[str, np.ndarray]
    entries: int
    bytes: int

    def describe(self) -> str:
        total = len(self.store)
        return f"{self.entries:,} of {total:,} entries ({size_text(self.bytes)}) in {self.store.folder}"


def waste_of(inputs: Inputs) -> list[Waste]:
    """What the caches of images, texts and masks have that a command with these inputs does not need."""
    caches = inputs.caches
    return [
        find_waste(caches.latents, inputs.latent_entries.keys),
        find_waste(caches.texts, inputs.text_keys()),
        *([] if caches.masks is None else [find_waste(caches.masks, inputs.mask_entries.keys)]),
    ]


def stores(folder: Path) -> list[Path]:
    """The folders of the stores in a cache folder."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and _STORE.fullmatch(path.name))


def find_waste(store: Store, needed: np.ndarray) -> Waste:
    """What is not needed of a store if the entries with these keys [n] of PACKED are. Nothing is read but the index."""
    stays = np.isin(store.keys, needed)
    kept: dict[str, np.ndarray] = {}
    freed = 0.0
    for name, size, rows, members in store.shards():
        keys = store.keys[members[stays[members]]]
        if len(keys) < rows:
            kept[name] = keys
            freed += size * (rows - len(keys)) / rows
    return Waste(store, kept, int((~stays).sum()), round(freed))


def remove_waste(found: Sequence[Waste]) -> None:
    """Removes what was found; the stores must then be opened again.

    Raises UserError if another command uses one of the stores, a row is damaged, or the disk fails; nothing that is needed is lost.
    """
    with contextlib.ExitStack() as locks:
        for waste in found:
            locks.enter_context(waste.store.alone())
        for waste in found:
            _rewrite(waste.store, waste.kept)


def _rewrite(store: Store, kept: Mapping[str, np.ndarray]) -> None:
    """Replaces shards by new ones that have only these keys of theirs."""
    rows: list[dict[str, Any]] = []
    replaced, written, size = [], set(), 0
    with progress(total=len(kept), description=f"pruning {store.folder.name}", unit="shard") as bar:
        for number, (name, keys) in enumerate(kept.items(), 1):
            for key in hex_digits(keys):
                tensors, metadata = store.row(key)
                rows.append(make_row(key, tensors, metadata))
                size += sum(tensor.nbytes for tensor in tensors.values())
            replaced.append(name)
            if number == len(kept) or size >= _SHARD_BYTES:
                if rows:
                    with writing("write to", store.folder):
                        written.add(write_shard(store.folder, store.tensors, rows).stem)
                for old in replaced:
                    if old not in written:  # what stays of one shard may be what another one was
                        # The manifest first: without it the Arrow file is not part of the store.
                        remove(store.folder / f"{old}.json")
                        remove(store.folder / f"{old}.arrow")
                rows, replaced, size = [], [], 0
            bar.update()


def leftovers(folder: Path) -> Iterator[tuple[Path, int]]:
    """(path, bytes) of the files in a store's folder that are of no use: damaged shards, and Arrow files without a manifest.

    An Arrow file that was written within the last hour may be that of a shard whose manifest is on its way.
    """
    for path in sorted(folder.iterdir()):
        if match := _OURS.fullmatch(path.name):
            with contextlib.suppress(FileNotFoundError):
                status, is_whole = path.stat(), path.with_suffix(".json").exists()
                if match[2] or (not is_whole and time.time() - status.st_mtime > _HOUR):
                    yield path, status.st_size
