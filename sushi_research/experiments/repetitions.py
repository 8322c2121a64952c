"""Runs that should be equal: the same settings, seed and code, on the same CPU. If their results differ, something did that is not
recorded, and the page says so. On a GPU equal runs may differ, because its fastest kernels add in a varying order.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from sushi_research.experiments import code_variants
from sushi_research.reports.curve import Curve
from sushi_research.reports.run_record import RunRecord
from sushi_research.runs import identity, provenance

# Metrics that the clock and the machine determine.
NOT_LEARNED = ("images_per_second", "gpu_seconds", "cpu_seconds", "data_wait_share", "peak_memory_gib")
# Settings that are not part of the identity and change rounding.
ROUNDING = (
    "train.batch_size",
    "train.accumulation",
    "train.attention",
    "train.deterministic",
    "train.gradient_checkpointing",
)
LENGTH = ("train.steps", "train.epochs")


def warnings(records: Sequence[RunRecord]) -> list[str]:
    """A sentence for each run that should equal an earlier one and does not: both names, and where they first differ."""
    groups: dict[str, list[RunRecord]] = {}
    for run in records:
        if (key := _key(run)) is not None:
            groups.setdefault(key, []).append(run)
    found = []
    for first, *others in groups.values():
        for other in others:
            if place := first_difference(first, other):
                found.append(
                    f"{first.name} and {other.name} have the same settings, seed and code, and were trained on the same kind of "
                    f"CPU, so they should be equal; they differ from {place} on: something that is not recorded was different"
                )
    return found


def _key(run: RunRecord) -> str | None:
    """Everything that determines the result of a run on a CPU; None for a run of which that is not known, or on a GPU."""
    if run.seed is None or not run.entries or code_variants.history(run) is None:
        return None
    # A continued run equals one that was never stopped, so a launch counts only if it changed something.
    changes: list[tuple[int, str]] = []
    for entry in run.launches:
        if (conditions := _conditions(run, entry)) is None:
            return None
        if not changes or changes[-1][1] != conditions:
            changes.append((entry.get("step") or 0, conditions))
    return json.dumps(
        [sorted(identity.without_locations(run.identity).items()), code_variants.history(run), changes], sort_keys=True
    )


def _conditions(run: RunRecord, entry: dict[str, Any]) -> str | None:
    """What determines rounding in one launch, as text; None on a GPU."""
    machine = entry.get("machine") or {}
    device = entry.get("device")
    if device is None or machine.get("gpu_memory_gib") is not None or device == "mps":
        return None
    libraries = entry.get("libraries") or {}
    settings = identity.flatten(entry.get("resolved_config") or {})
    keys = ROUNDING + (LENGTH if _depends_on_length(run) else ())
    return json.dumps(
        [
            device,
            machine.get("threads"),
            entry.get("world"),
            entry.get("precision"),
            [libraries.get(name) for name in provenance.ARITHMETIC],
            [settings.get(key) for key in keys],
        ]
    )


def _depends_on_length(run: RunRecord) -> bool:
    return {"schedule.name", "schedule.warmup"} <= run.identity.keys() and identity.depends_on_length(run.identity)


def first_difference(one: RunRecord, other: RunRecord) -> str | None:
    """The first step at which two runs differ and the value that does, in words; None if all that both have is equal."""
    found = list(_metrics(one, other))
    for curve, name in (("evaluation", "the validation losses"), ("drift", "the drift")):
        found += [
            (step, f"{name} of step {step}") for step in _unequal_steps(getattr(one, curve), getattr(other, curve))
        ]
    return min(found, key=lambda each: each[0])[1] if found else None


def _metrics(one: RunRecord, other: RunRecord) -> Iterator[tuple[int, str]]:
    by_step = {line["step"]: line for line in other.trained}
    for line in one.trained:
        values = by_step.get(line["step"], {})
        for key in line.keys() & values.keys():
            if key not in NOT_LEARNED and line[key] != values[key]:
                yield line["step"], f"step {line['step']} ({key} {line[key]} and {values[key]})"
                break


def _unequal_steps(one: Curve | None, other: Curve | None) -> Iterator[int]:
    """The steps at which two runs have other losses on the same validation set."""
    if one is None or other is None or one.set_hash != other.set_hash or one.loss.shape[1:] != other.loss.shape[1:]:
        return
    for step in sorted({*one.steps} & {*other.steps}):
        pair = [curve.loss[curve.steps.index(step)] for curve in (one, other)]
        if not np.array_equal(*pair, equal_nan=True):
            yield step
