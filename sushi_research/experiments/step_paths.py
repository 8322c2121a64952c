"""How runs launched their steps: recorded as CUDA graphs, or eager. Runs of one variant did it in one way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sushi_research.reports.run_record import RunRecord
from sushi_research.runs import provenance

KEY = "step path"


def history(run: RunRecord) -> tuple[tuple[int, str], ...]:
    """(first step, path) of each stretch of steps that ran in one way. Runs of older versions were eager."""
    found: list[tuple[int, str]] = []
    for entry in run.launches:
        step, path = entry.get("step"), provenance.step_path(entry)
        if not found or found[-1][1] != path:
            found.append((step if isinstance(step, int) else 0, path))
    return tuple(found) or ((0, "eager"),)


def label(run: RunRecord) -> str:
    """The path of a run for a table: "recorded", or "eager, recorded from step 500"."""
    return ", ".join(f"{path} from step {step}" if step else path for step, path in history(run))


def differing(variants: Sequence[Sequence[RunRecord]], is_file: Sequence[bool]) -> dict[str, list[Any]]:
    """The row of the table of differing settings, from the runs of each variant; empty if the paths do not differ."""
    values = [
        "" if file else " | ".join(dict.fromkeys(map(label, runs)))
        for runs, file in zip(variants, is_file, strict=True)
    ]
    return {KEY: values} if len({value for value in values if value}) > 1 else {}
