"""Runs of one variant that were trained with the same seed count as one: their losses are averaged before anything is tested.

They differ only by rounding or not at all, so they are no further evidence about other seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from sushi_research.reports.run_record import RunRecord


def by_seed(runs: Sequence[RunRecord]) -> dict[int | None, list[RunRecord]]:
    """The runs of each distinct seed, sorted by seed.

    Runs of an unknown seed may share one with any other run. They count as one seed if there is no known seed; else they are left
    out.
    """
    groups: dict[int | None, list[RunRecord]] = {}
    for run in runs:
        groups.setdefault(run.seed, []).append(run)
    if len(groups) > 1:
        groups.pop(None, None)
    return dict(sorted(groups.items(), key=lambda group: (group[0] is None, group[0])))


def runs_that_count(*variants: Sequence[RunRecord]) -> list[RunRecord]:
    """The runs of the variants without those that `by_seed` leaves out."""
    return [run for runs in variants for group in by_seed(runs).values() for run in group]


def per_seed(runs: Sequence[RunRecord], losses_of: Callable[[RunRecord], np.ndarray]) -> np.ndarray:
    """`losses_of` each run as float64, averaged over the runs of one seed: [distinct seeds, ...]."""
    groups = by_seed(runs).values()
    return np.stack([np.mean([np.asarray(losses_of(run), np.float64) for run in group], axis=0) for group in groups])


def notes_on_seeds(runs: Sequence[RunRecord], label: str) -> list[str]:
    """A sentence for each seed of the variant `label` that several runs share, and for runs that are left out."""
    found = []
    groups = by_seed(runs)
    for seed, group in groups.items():
        if len(group) > 1:
            names = ", ".join(run.name for run in group)
            what = "an unknown seed" if seed is None else f"seed {seed}"
            found.append(
                f"{label} has {len(group)} runs of {what} ({names}): their losses are averaged and count as one run"
            )
    left_out = [run.name for run in runs if run.seed not in groups]
    if left_out:
        found.append(f"{label} has runs of an unknown seed ({', '.join(left_out)}): no test result uses them")
    return found
