"""The metadata of a file that a tool wrote: what its sources said, corrected where it is not true any more, and how it was made."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sushi_research import __version__
from sushi_research.adapters import peft_settings, trained_images
from sushi_research.adapters.entries import Difference, Entry, Hadamard, Kronecker, LowRank
from sushi_research.adapters.formats.writing import Layout, has_one_scale
from sushi_research.adapters.kohya_format import tensors_hash
from sushi_research.adapters.tools.located import Entries, Located, each_entry
from sushi_research.errors import UserError, printable
from sushi_research.models import ARCHITECTURES
from sushi_research.models.header import Header
from sushi_research.user_files import parse_json

KEY = "sushi_research.history"
# Programs read the metadata of all files that they show: of a longer history the last steps are kept.
MOST_STEPS, MOST_LETTERS = 50, 50_000
# The facts of kohya's layout.
_NETWORK = ("ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args")
# What the writer says itself.
_WRITTEN = ("format", "sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256", peft_settings.KEY)


def steps_of(header: Header) -> list[dict[str, Any]]:
    """The steps that led to the file with this header; [] if it says nothing of the form that we write."""
    try:
        found = parse_json(header.metadata.get(KEY, "[]"), KEY)
    except UserError:
        return []
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []


def step(operation: str, output: Path, sources: Sequence[Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """One step of a history. A source is a file (its name and the hash of its tensors are recorded), or the name of a base."""
    inputs = [
        {"name": each.name, "hash": tensors_hash(each)} if isinstance(each, Path) else {"name": str(each)}
        for each in sources
    ]
    return {
        "made": output.name,
        "by": f"sushi-research {__version__}",
        "operation": operation,
        "from": inputs,
        "settings": dict(settings),
    }


def metadata_of(
    sources: Sequence[Located],
    made: Mapping[str, Any],
    architecture: str,
    entries: Entries,
    output: Path,
    layout: Layout,
) -> dict[str, str]:
    """The metadata of a file with these entries: of one source all that it says, of several what all of them say equally; with the
    facts of the format, the images that they were trained on, and the history."""
    headers = [each.adapter.header for each in sources]
    kept: dict[str, str] = {}
    if headers:
        kept = {
            key: value
            for key, value in headers[0].metadata.items()
            if key not in _WRITTEN and all(other.metadata.get(key) == value for other in headers)
        }
    if len(headers) > 1:
        kept |= _images(headers, kept)
    kept = {key: value for key, value in kept.items() if key not in _NETWORK}
    network = _network(entries) if layout == "kohya" else {}
    found = {**_kind_of_base(architecture), **kept, **network, **_names(output)}
    steps: list[Mapping[str, Any]] = [each for header in headers for each in steps_of(header)]
    return {**found, KEY: text_of([*steps, made])}


def describe(found: Mapping[str, Any]) -> str:
    """A step of a history on one line."""
    inputs = found.get("from")
    names = [str(each.get("name")) for each in inputs if isinstance(each, dict)] if isinstance(inputs, list) else []
    settings = found.get("settings")
    said = [f"{name} {value}" for name, value in settings.items()] if isinstance(settings, dict) else []
    text = f"{found.get('operation')} of {' and '.join(names)}{', '.join(['', *said])}, as {found.get('made')}"
    return printable(text)[:500]


def text_of(steps: Sequence[Mapping[str, Any]]) -> str:
    """The steps as JSON, the last ones if they are too many."""
    kept = list(steps)[-MOST_STEPS:]
    while len(text := json.dumps(kept, ensure_ascii=False)) > MOST_LETTERS and len(kept) > 1:
        kept = kept[1:]
    return text


def _images(headers: Sequence[Header], kept: dict[str, str]) -> dict[str, str]:
    """What the file says about the images that any of its sources was trained on."""
    for key in (trained_images.KEY, trained_images.OTHERS_KEY):
        kept.pop(key, None)
    said = [trained_images.trained_on(header.path) for header in headers]
    images = frozenset().union(*(each.images or () for each in said))
    if len(images) > trained_images.MAX_IMAGES or not images:
        return {}
    others = {} if all(each.is_complete for each in said) else {trained_images.OTHERS_KEY: "unknown"}
    return {trained_images.KEY: "".join(sorted(images)), **others}


def _kind_of_base(architecture: str) -> dict[str, str]:
    """By which programs know the base; A1111 takes a file with any metadata but without these for one of SD1."""
    formats = ARCHITECTURES[architecture].formats()
    return {
        "ss_v2": "False",
        "ss_base_model_version": formats.BASE_VERSION["epsilon"],
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": formats.MODELSPEC_ARCHITECTURE,
        "modelspec.implementation": formats.MODELSPEC_IMPLEMENTATION,
    }


def _network(entries: Entries) -> dict[str, str]:
    """kohya's facts about the matrices; "Dynamic" where they differ, as kohya's resize_lora.py writes it."""
    found = [entry for _, _, entry in each_entry(entries)]
    if not all(isinstance(entry, LowRank) and entry.magnitude is None for entry in found):
        return {"ss_network_module": "lycoris.kohya", "ss_network_args": json.dumps(_lycoris(found))}
    pairs = [entry for entry in found if isinstance(entry, LowRank)]
    # Of a file whose modules differ, an alpha would be wrong for some, and none is written.
    has_alpha = all(has_one_scale(each) for each in entries.values())
    convolutions = [entry for entry in pairs if max(entry.down.shape[2:], default=1) > 1]
    args = {}
    if convolutions:
        args = {"conv_dim": _only(entry.rank for entry in convolutions)}
        args |= {"conv_alpha": _only(entry.alpha for entry in convolutions)} if has_alpha else {}
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": _only(entry.rank for entry in pairs),
        "ss_network_alpha": _only(entry.alpha for entry in pairs) if has_alpha else "Dynamic",
        "ss_network_args": json.dumps(args),
    }


def _lycoris(entries: Sequence[Entry]) -> dict[str, str]:
    """LyCORIS' name of the kind and the axis of its magnitudes (of the outputs or not), of a file whose layers are all of one."""
    names = {LowRank: "lora", Hadamard: "loha", Kronecker: "lokr", Difference: "full"}
    kinds = {(names[type(entry)], _axis(entry)) for entry in entries}
    if len(kinds) > 1:
        return {}
    [(name, axis)] = kinds
    return {"algo": name} | ({} if axis is None else {"dora_wd": "True", "wd_on_output": str(axis == 0)})


def _axis(entry: Entry) -> int | None:
    """The axis of the weight that the magnitudes are of; None without any."""
    magnitude = None if isinstance(entry, Difference) else entry.magnitude
    return None if magnitude is None else int(magnitude.ndim > 1 and magnitude.shape[0] == 1)


def _only(values: Iterable[float]) -> str:
    """The value that all have, or "Dynamic"."""
    found = set(values)
    return str(*found) if len(found) == 1 else "Dynamic"


def _names(output: Path) -> dict[str, str]:
    return {"ss_output_name": output.stem, "modelspec.title": output.stem}
