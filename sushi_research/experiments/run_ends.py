"""Where runs end, in samples seen. What is of finished runs, such as scores, is compared only where all runs of a pair end."""

from __future__ import annotations

from collections.abc import Sequence

from sushi_research.reports.run_record import RunRecord


def last_common(runs: Sequence[RunRecord]) -> float | None:
    """The samples seen that all runs reached, whatever they were evaluated on; None if that is not known."""
    reached = [_reached(run) for run in runs]
    return None if None in reached else min(reached)


def ends_at(run: RunRecord, at: float | None, step: int | None, has_file: bool) -> bool:
    """Whether a run ends where its pair is compared: at `step`, or `at` in samples, or (`has_file`) at its last evaluation."""
    if step is not None:
        return run.finished_at == step
    evaluated = run.evaluation
    if run.finished_at is None or (evaluated is not None and run.finished_at != evaluated.steps[-1]):
        return False
    return has_file if at is None else _reached(run) == at


def _reached(run: RunRecord) -> float | None:
    """The samples seen at the last evaluation of a run; of one without evaluations, at its end."""
    if run.evaluation is not None:
        return None if run.evaluation.samples is None else float(run.evaluation.samples[-1])
    size = run.global_batch_size
    return None if run.finished_at is None or size is None else float(run.finished_at * size)
