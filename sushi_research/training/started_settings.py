"""The config section `lora` of a run that starts from a file: kind, rank, alpha and targets are those of the file."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from sushi_research.adapters.entries import Entry, Hadamard, Kronecker, LowRank, is_input_axis
from sushi_research.adapters.settings import Kind
from sushi_research.adapters.targets import PRESETS, matching, resolve_targets
from sushi_research.config import TrainingConfig
from sushi_research.errors import UserError


def section_of(config: TrainingConfig, path: Path, entries: Mapping[str, Entry], unet: Any) -> Any:
    """The section `lora` with the file's kind, rank, alpha and targets. `unet` may be without weights.

    UserError if the config has others, or if none can be had.
    """
    kind = kind_of(path, entries, unet)
    (rank, alpha), count = Counter(map(rank_and_alpha, entries.values())).most_common(1)[0]
    share = "" if count == len(entries) else f" (in {count} of {len(entries)} modules)"
    is_whole = all(isinstance(each, Kronecker) and each.rank is None for each in entries.values())
    whole = "whole matrices only, where rank and alpha have no effect" if is_whole else ""
    given = config.lora
    # Alphas in a file are often rounded to 16 bits.
    for key, shown, of_file, differs in (
        ("kind", given.kind, f"kind {kind}", given.kind not in (None, kind)),
        ("rank", given.rank, whole or f"rank {rank:g}{share}", given.rank not in (None, rank)),
        (
            "alpha",
            given.alpha,
            whole or f"alpha {alpha:g}{share}",
            given.alpha is not None and abs(given.alpha - alpha) > 1e-3 * abs(alpha),
        ),
    ):
        if differs:
            raise UserError(
                f"lora.{key} is {shown if isinstance(shown, str) else format(shown, 'g')}, and {path}, from which the run starts, "
                f"has {of_file}: remove lora.{key}, or set it to null."
            )
    targets = _targets(given.targets, path, entries, [name for name, _ in unet.named_modules()])
    values = given.model_dump() | {"kind": kind, "rank": rank, "alpha": alpha, "targets": targets}
    try:
        return type(given).model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            f"a run cannot start from {path}: its {first['loc'][0]} is {first['input']!r:.60} ({first['msg']})."
        ) from error


def kind_of(path: Path, entries: Mapping[str, Entry], component: Any) -> Kind:
    """The kind that can be trained on with these entries. UserError if there are several, or one that is not trained here."""
    kinds = {where: _kind(entry, component.get_submodule(where).weight) for where, entry in entries.items()}
    for where, (kind, what) in kinds.items():
        if kind is None:
            raise UserError(
                f"{path} holds {what} ({entries[where].name:.200}), which is not trained here: start from another file, or from an "
                "approximation by low-rank matrices (scripts/convert_lora.py resize)."
            )
    found = Counter(kind for kind, _ in kinds.values())
    if len(found) > 1:
        parts = ", ".join(f"{kind} in {count} modules" for kind, count in found.most_common())
        raise UserError(
            f"{path} holds several kinds of adapters ({parts}), and a run trains one: start from a file with one kind."
        )
    (kind,) = found
    assert kind is not None
    return kind


def _kind(entry: Entry, weight: Any) -> tuple[Kind | None, str]:
    """The kind of an entry, None if it is not trained; and what it is, for a message."""
    if not isinstance(entry, LowRank | Hadamard | Kronecker):
        return None, "full differences of weights"
    if entry.bias is not None:
        return None, "a change of biases"
    if isinstance(entry, LowRank):
        if entry.mid is not None:
            return None, "a LoCon with Tucker decomposition"
        if entry.magnitude is None:
            return "lora", ""
        if not is_input_axis(entry, weight):
            return None, "a DoRA with a magnitude for each output"
        return "dora", ""
    name = "LoHa" if isinstance(entry, Hadamard) else "LoKr"
    if entry.magnitude is not None:
        return None, f"a {name} with magnitudes (DoRA)"
    if (entry.t1 if isinstance(entry, Hadamard) else entry.t2) is not None:
        return None, f"a {name} with Tucker decomposition"
    return ("loha" if isinstance(entry, Hadamard) else "lokr"), ""


def rank_and_alpha(entry: Entry) -> tuple[int, float]:
    """Of a Kronecker product of whole matrices the rank from which on it would be one."""
    assert isinstance(entry, LowRank | Hadamard | Kronecker)
    if isinstance(entry, LowRank):
        return entry.rank, entry.alpha
    rank = entry.rank
    if rank is None:
        assert isinstance(entry, Kronecker) and entry.w2 is not None
        rank = math.ceil(max(entry.w2.shape[:2]) / 2)
    alpha = entry.scale * rank
    # Files have alphas in fp32, which the product misses by a rounding in fp64.
    stored = float(np.float32(alpha))
    return rank, stored if math.isclose(stored, alpha, rel_tol=1e-14) else float(f"{alpha:.15g}")


def _targets(
    given: str | Sequence[str] | None, path: Path, entries: Mapping[str, Entry], modules: Sequence[str]
) -> str | list[str]:
    """The targets of the file; UserError if others are given."""
    if given is None:
        return targets_of(entries, modules)
    chosen = matching(resolve_targets(given), modules)
    if chosen != set(entries):
        other = min(chosen ^ set(entries))
        raise UserError(
            f"lora.targets is {given}, which are {len(chosen)} modules, and {path}, from which the run starts, adapts "
            f"{len(entries)} modules ({other} is only in the {'file' if other in entries else 'targets'}): remove lora.targets, or "
            "set it to null."
        )
    return given if isinstance(given, str) else list(given)


def targets_of(paths: Collection[str], modules: Sequence[str]) -> str | list[str]:
    """The targets that name exactly these modules: a preset, or a list of the shortest endings. `modules` are all of the UNet."""
    wanted = set(paths)
    for preset, endings in PRESETS.items():
        if matching(endings, modules) == wanted:
            return preset
    chosen: list[str] = []
    for path in paths:
        if path in matching(chosen, [path]):
            continue
        parts = path.split(".")
        endings = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
        chosen.append(next(ending for ending in endings if matching([ending], modules) <= wanted))
    return chosen
