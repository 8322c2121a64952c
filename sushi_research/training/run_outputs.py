"""Files of a run that are made again where they are missing or damaged: what describes the run, and what it makes at its end."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from sushi_research.adapters import kohya_format
from sushi_research.caches.inputs import Inputs
from sushi_research.config.command_line import config_to_yaml
from sushi_research.data import dataset
from sushi_research.errors import UserError
from sushi_research.evaluation.measured_sets import MeasuredSets
from sushi_research.evaluation.results import Results
from sushi_research.evaluation.validation_set import ValidationSet
from sushi_research.files import write_atomic, write_json
from sushi_research.reports import run_page, thumbnails
from sushi_research.runs import provenance, records
from sushi_research.runs.job import Job
from sushi_research.runs.metrics_file import MetricsFile
from sushi_research.runs.run_folder import RunFolder
from sushi_research.sampling import plots, sample_grids
from sushi_research.training import best_files, evaluation_records, page_output
from sushi_research.training.run_plan import Plan


def write_descriptions(
    job: Job, inputs: Inputs, plan: Plan, val_set: ValidationSet | None, only: Collection[Path] | None = None
) -> None:
    """Writes config.yaml, plan.json, data_report.json and, if the run is evaluated, validation_set.json; or `only` some of them."""
    run, data = job.run, inputs.data
    assert run is not None
    writers: dict[Path, Callable[[], None]] = {
        run.config: lambda: write_atomic(run.config, config_to_yaml(job.config).encode()),
        run.plan: lambda: write_json(run.plan, plan.to_json()),
        run.data_report: lambda: dataset.write_report(
            data.scan, run.data_report, data.evaluation_scan, data.prior_scan
        ),
    }
    if val_set:
        writers[run.validation_set] = lambda: write_json(run.validation_set, val_set.describe())
    for path, write in writers.items():
        if only is None or path in only:
            write()


def damaged_descriptions(run: RunFolder, val_set: ValidationSet | None) -> dict[Path, str]:
    """What is wrong with each of the files of `write_descriptions` that is missing or damaged, as a sentence."""
    readers: dict[Path, Callable[[], Any]] = {
        run.config: lambda: records.read_config(run.config, ""),
        run.plan: lambda: records.read_as(run.plan, records.Plan, ""),
        run.data_report: lambda: records.read_as(run.data_report, records.DataReport, ""),
    }
    # Without results the run may not have been evaluated before.
    if val_set and (run.validation_set.exists() or run.evaluation.exists()):
        readers[run.validation_set] = lambda: records.read_as(run.validation_set, records.ValidationSetRecord, "")
    return {path: problem for path, read in readers.items() if (problem := _problem(path, read))}


def lost(
    job: Job,
    inputs: Inputs,
    record: dict[str, Any] | None,
    steps: int,
    sets: MeasuredSets,
) -> dict[Path, str]:
    """What is wrong with each file of a run's end that a checkpoint gives again, as a sentence; {} if the run is not at its end.

    Damaged results are not among them: they also hold earlier steps, so removing them is the user's decision.
    """
    run, config = job.run, job.config
    assert run is not None
    if record is None or record["finished_at"] != steps:
        return {}
    found = {}
    if problem := kohya_format.problem_of(run.adapter):
        found[run.adapter] = problem
    if config.ema.decay is not None and (problem := kohya_format.problem_of(run.average)):
        found[run.average] = problem
    found |= evaluation_records.lost(run, sets, steps)
    best = _lost_best(job, sets.validation)
    if best and best.can_be_made:
        found[best.path] = best.problem
    if config.sample.enabled:
        found |= sample_grids.lost(run.samples, steps, sample_grids.rows_of(config, inputs.prompts))
    return found


def _lost_best(job: Job, val_set: ValidationSet | None) -> best_files.Lost | None:
    """The file of the best step, if there should be one and it is lost."""
    assert job.run is not None
    if val_set is None or not job.config.evaluation.keep_best:
        return None
    try:
        is_of_another = Results(job.run.evaluation).is_of_another(val_set)
    except UserError:
        return None  # evaluation_records.changes says it
    return None if is_of_another else best_files.lost(job.run)


def complete_pictures(job: Job, inputs: Inputs, plan: Plan, next_step: int | None) -> list[str]:
    """Makes those pictures again that need no model, the grids of images; returns a sentence for each damaged picture.

    `next_step` is the step at which the run goes on, None for a finished run.
    """
    run, found = job.run, []
    assert run is not None
    with plots.optional("the run is still without it"):
        rows = sample_grids.rows_of(job.config, inputs.prompts) if job.config.sample.enabled else []
        again = next_step == plan.steps or plan.due.sample.at(next_step or 0)
        found = sample_grids.complete_grids(run.samples, rows, next_step, again)
    return found


def make_again(
    job: Job, inputs: Inputs, plan: Plan, val_set: ValidationSet | None, damaged: Collection[Path]
) -> list[str]:
    """Writes the `damaged` descriptions of a finished run, and its curves if they are; returns a sentence for each other file that
    is damaged."""
    run = job.run
    assert run is not None
    write_descriptions(job, inputs, plan, val_set, damaged)
    found, metrics = [], MetricsFile(run.metrics)
    if best := _lost_best(job, val_set):
        found.append(f"{best.problem}, and no checkpoint of its step is left to make it again from")
    found.append(_problem(run.provenance, lambda: provenance.entries(run.provenance)))
    if os.path.lexists(run.stage_timings):
        remedy = "restore or remove it"
        found.append(
            _problem(run.stage_timings, lambda: records.read_as(run.stage_timings, records.TIMINGS, remedy), remedy)
        )
    try:
        found.append(metrics.mark_missing(plan.steps))
        metrics.read()
    except UserError as error:
        found.append(str(error))
    problems = {run.curves: plots.picture_problem(run.curves), run.report: "" if run.report.exists() else plots.MISSING}
    if any(problems.values()):
        with page_output.optional("the run is still without it"):
            thumbnails.write(run, inputs.data.items, inputs.data.sets)
            run_page.write(run, f"finished at step {plan.steps}")
            for path, problem in problems.items():
                # Without any line in metrics.jsonl there are no curves.
                is_made = path == run.report or not plots.picture_problem(path)
                outcome = "it is made again" if is_made else f"there are no numbers in {run.metrics} to make it from"
                found += [f"{path} {problem}: {outcome}"] if problem else []
    return [sentence for sentence in found if sentence]


def _problem(path: Path, read: Callable[[], Any], remedy: str = "") -> str:
    """The sentence of the UserError that reading a file gives; "" if there is none."""
    if not os.path.lexists(path):
        return f"{path} is missing"
    try:
        read()
    except UserError as error:
        return str(error).removesuffix(": ").removesuffix("; ")
    return ""
