"""The variants of a comparison: runs whose identity is equal except for the seed, trained with the same code (code_variants.py)
and with their steps launched in the same way (step_paths.py)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from sushi_research.errors import UserError, printable
from sushi_research.experiments import code_variants, step_paths
from sushi_research.reports.run_record import RunRecord
from sushi_research.runs.identity import without_locations

SEED = "train.seed"


@dataclass(frozen=True)
class Variant:
    """Runs that differ only in their seed, sorted by seed."""

    label: str
    runs: tuple[RunRecord, ...]

    @property
    def seeds(self) -> tuple[int | None, ...]:
        return tuple(run.seed for run in self.runs)

    @property
    def is_file(self) -> bool:
        return all(run.state == "file" for run in self.runs)


def variants_of(records: Sequence[RunRecord], pool_code: bool = False) -> tuple[list[Variant], bool]:
    """(variants in the given order, whether each run is treated as a variant because all belong to one variant)."""
    groups: dict[str, list[RunRecord]] = {}
    for record in records:
        settings = {key: value for key, value in without_locations(record.identity).items() if key != SEED}
        code = None if pool_code else code_variants.history(record)
        # An adapter file has no identity, so it is a variant of its own.
        key = repr((sorted(settings.items()), code, step_paths.history(record))) if settings else str(record.path)
        groups.setdefault(key, []).append(record)
    by_run = len(groups) == 1 and len(records) > 1
    parts = [[record] for record in records] if by_run else list(groups.values())
    parts = [sorted(part, key=lambda run: (run.seed is None, run.seed, run.name)) for part in parts]
    bare = [{_without_seed(run.name) for run in part} for part in parts]
    labels = [part[0].name if by_run or len(names) > 1 else min(names) for part, names in zip(parts, bare, strict=True)]
    if len(set(labels)) < len(labels):
        labels = [part[0].name for part in parts]
    if len(set(labels)) < len(labels):
        labels = [f"{part[0].path.resolve().parent.name}/{part[0].name}" for part in parts]
    if len(set(labels)) < len(labels):
        labels = [str(part[0].path) for part in parts]
    return [Variant(printable(label), tuple(part)) for label, part in zip(labels, parts, strict=True)], by_run


def variants_called(name: str, variants: Sequence[Variant]) -> list[Variant]:
    """The variants that a name means: the one with this label or a run of this name, else those of which all runs, else some, are
    called so without their seeds. Several have the name if its runs were trained with different code. UserError if there is none.
    """
    names = [{_without_seed(run.name) for run in variant.runs} for variant in variants]
    labelled = [variant for variant in variants if name in (variant.label, *(run.name for run in variant.runs))][:1]
    named = [variant for variant, bare in zip(variants, names, strict=True) if bare == {name}]
    chosen = labelled or named or [variant for variant, bare in zip(variants, names, strict=True) if name in bare]
    if not chosen:
        raise UserError(f"no variant is called {name}: choose from {', '.join(variant.label for variant in variants)}.")
    return chosen


def _without_seed(name: str) -> str:
    return re.sub(r"[-_]seed[-_]?\d+$", "", name)
