"""Keeps how fast a run trained, for the plans of other runs on this machine."""

from __future__ import annotations

from pathlib import Path

from sushi_research.errors import UserError
from sushi_research.runs import measured, provenance, rates, records
from sushi_research.runs.job import Job
from sushi_research.training.cost_plan import conditions_of

_REMEDY = "its speed is not kept"


def note_rate(job: Job) -> None:
    """Keeps the FLOPs and the seconds of this launch's micro-batches (runs/rates.py). Only the main process calls it.

    Nothing is kept of a launch of a few steps, or whose plan has no FLOPs. This serves estimates, so what cannot be read is passed
    over: other parts report it.
    """
    run, train = job.run, job.config.train
    assert run is not None
    try:
        plan = records.read_as(run.plan, records.Plan, _REMEDY)
        entry = provenance.entries(run.provenance, _REMEDY)[-1]
        found = measured.of_launch(run.path, entry)
    except (UserError, OSError, IndexError):
        return
    try:
        flops, base_bytes = plan["cost"]["step_flops"], plan["base"]["weights"]["compute_bytes"]
    except (KeyError, TypeError):
        return
    if found is None or not isinstance(flops, int | float) or flops <= 0:
        return
    conditions = conditions_of(job, provenance.step_path(entry) == "recorded", base_bytes)
    seconds = found.seconds_per_image * job.global_batch_size / train.accumulation
    rates.remember(Path(job.config.cache.folder), conditions, flops / train.accumulation, seconds)
