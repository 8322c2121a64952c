"""Starts or resumes a run: determines its identity and step, and updates the files that describe it.

`decision.decide` has the policy. This module calls it, prints the decision, and brings the run folder in line with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from accelerate.utils import broadcast_object_list

from sushi_research import randomness
from sushi_research.adapters import snapshots
from sushi_research.adapters.settings import settings_of
from sushi_research.caches.inputs import Inputs
from sushi_research.config.command_line import config_to_dict
from sushi_research.config.keys import default_values
from sushi_research.errors import UserError
from sushi_research.evaluation.measured_sets import MeasuredSets
from sushi_research.models.prediction import Prediction
from sushi_research.runs import identity, provenance
from sushi_research.runs.checkpoint import Checkpoint, latest_checkpoint, read_checkpoint
from sushi_research.runs.decision import decide
from sushi_research.runs.job import Job, agree
from sushi_research.runs.metrics_file import MetricsFile
from sushi_research.runs.run_folder import RunFolder
from sushi_research.sampling import sample_grids
from sushi_research.terminal import say
from sushi_research.training import best_files, evaluation_records, hub_upload, run_outputs, step_files
from sushi_research.training.identity_facts import hashes_of, measured_sets_of, provenance_of
from sushi_research.training.run_plan import Plan


@dataclass(frozen=True)
class RunState:
    """The state of a run at launch: whether there is nothing to do, and the step and checkpoint to continue from.

    `sets` are those that the run is measured on. `provenance` is the entry of this launch.
    """

    nothing_to_do: bool
    step: int
    checkpoint: Checkpoint | None
    identity: dict[str, Any]
    hashes: dict[str, Any]
    sets: MeasuredSets
    provenance: dict[str, Any]


def start_or_resume(job: Job, inputs: Inputs, plan: Plan) -> RunState:
    """Decides whether the run starts, continues or is finished (decision.decide), and prints the decision.

    Then writes config.yaml, plan.json, data_report.json, validation_set.json and provenance.json, and drops metrics, results
    and samples from after the checkpoint, and results of sets that it is no longer measured on. Warns about that, and about changes
    in code, libraries and machine since the launch that saved it.

    The adapter of a finished run is uploaded if run.push_to_hub says so.

    Raises UserError, without changing any file, if the run folder holds a run with another identity.
    """
    config, run, base, accelerator = job.config, job.run, inputs.base, job.accelerator
    hashes = hashes_of(job, inputs)
    facts = hashes | {
        "global_batch_size": job.global_batch_size,
        "precision": job.precision,
        "random_scheme": randomness.SCHEME,
        "vae_dtype": str(inputs.caches.vae_dtype).removeprefix("torch."),
    }
    if job.start is not None:
        facts["start_from"] = job.start.hash
    if inputs.data.captions and (texts := inputs.data.captions.facts()):
        facts["captions"] = texts
    if settings_of(config.lora, config.train.seed).drops:
        facts["dropout_split"] = plan.split
    if base.prediction != Prediction():
        facts["prediction"] = base.prediction.facts()
    settings = identity.run_identity(config_to_dict(config), facts)
    sets = measured_sets_of(job, inputs, hashes["base_model"]["unet"])
    entry = provenance_of(job, inputs, hashes, sets.validation, settings)
    outcome: list[Any] = [None]
    error = None
    if accelerator.is_main_process:
        try:
            record, checkpoint = _stored(run, default_values(type(config)))
            lost = run_outputs.lost(job, inputs, record, plan.steps, sets)
            if checkpoint is not None and lost:
                record["finished_at"] = None  # they are made again from the last checkpoint
            elif run.adapter in lost:
                raise UserError(
                    f"{lost[run.adapter]}, and the run {run.name}, which is finished, has no checkpoint to write it again from: "
                    "restore that file, or remove run.json and that file to train again, or give another --run.name"
                )
            decision = decide(run.name, record, checkpoint, settings, plan.steps, run.adapter.is_file())
            outcome_of_lost = (
                "it is made again" if checkpoint is not None else "no checkpoint is left to make it again from"
            )
            warnings = [f"{sentence}: {outcome_of_lost}" for sentence in lost.values()] + decision.warnings
            if decision.action == "continue":
                earlier = provenance.launches(provenance.entries(run.provenance), checkpoint.step)
                warnings += provenance.changes(earlier[-1] if earlier else None, entry)
            if decision.action != "start":
                warnings += evaluation_records.changes(run, sets, decision.action == "nothing")
                damaged = run_outputs.damaged_descriptions(run, sets.validation)
                warnings += [f"{sentence}: it is written again" for sentence in damaged.values()]
                next_step = checkpoint.step if decision.action == "continue" else None
                warnings += run_outputs.complete_pictures(job, inputs, plan, next_step)
            if decision.action == "nothing":
                warnings += run_outputs.make_again(job, inputs, plan, sets.validation, damaged)
            elif decision.action == "continue":
                MetricsFile(run.metrics).read()  # a damaged file is an error before anything is written
        except UserError as found:
            error = found
        else:
            say(decision.sentence)
            for warning in dict.fromkeys(warnings):
                say(f"warning: {warning}")
            outcome = [(decision.action, checkpoint.path.name if checkpoint else None)]
    agree(error)
    action, name = broadcast_object_list(outcome)[0]
    checkpoint = read_checkpoint(run.checkpoints / name) if name and action == "continue" else None
    step = checkpoint.step if checkpoint else 0
    state = RunState(action == "nothing", step, checkpoint, settings, hashes, sets, entry | {"step": step})
    if not state.nothing_to_do:
        with job.main_process_writes():
            if job.is_main:
                _describe_run(job, state, inputs, plan)
    elif job.is_main:
        hub_upload.push_finished(job)
    return state


def _stored(run: RunFolder, defaults: Mapping[str, Any]) -> tuple[dict[str, Any] | None, Checkpoint | None]:
    """(run.json, newest intact checkpoint) of the run folder, with their identities in the keys of this version."""
    checkpoint, record = latest_checkpoint(run.checkpoints), run.record()
    if record is not None:
        record["identity"] = identity.in_this_version(record["identity"], defaults)
    if checkpoint is not None:
        facts = {"identity": identity.in_this_version(checkpoint.facts["identity"], defaults)}
        checkpoint = replace(checkpoint, facts=checkpoint.facts | facts)
    return record, checkpoint


def _describe_run(job: Job, state: RunState, inputs: Inputs, plan: Plan) -> None:
    run = job.run
    assert run is not None
    run_outputs.write_descriptions(job, inputs, plan, state.sets.validation)
    provenance.add_entry(run.provenance, state.provenance)
    kept = state.step if state.checkpoint else -1
    evaluation_records.cut_back(run, state.sets, kept)
    best_files.cut_back(run, kept)
    snapshots.cut_back(run, kept)
    for sentence in step_files.set_aside(run, state.step if state.checkpoint else None, plan.steps):
        say(sentence)
    sample_grids.cut_back(run.samples, kept)
    sample_grids.cut_back(run.pictures, kept)
    if lost := MetricsFile(run.metrics).mark_missing(state.step):
        say(f"warning: {lost}")
    if state.checkpoint is None:
        run.mark_started(state.identity, plan.steps)
    else:
        run.mark_continued(plan.steps, state.identity)
