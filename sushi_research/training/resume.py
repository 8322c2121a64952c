"""Starts or resumes a run: determines its identity and step, and updates the files that describe it.

`run_folder.decide` has the policy. This module calls it, prints the decision, and brings the run folder in line with it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from accelerate.utils import broadcast_object_list

from sushi_research import randomness
from sushi_research.caches.inputs import Inputs
from sushi_research.config.command_line import config_to_dict, config_to_yaml
from sushi_research.config.keys import default_values
from sushi_research.data import dataset
from sushi_research.data.training_data import Data
from sushi_research.errors import UserError
from sushi_research.evaluation.drift import DriftSet
from sushi_research.evaluation.validation_set import ValidationSet
from sushi_research.files import write_atomic, write_json
from sushi_research.models.prediction import Prediction
from sushi_research.runs import identity, provenance, run_folder
from sushi_research.runs.checkpoint import Checkpoint, latest_checkpoint, read_checkpoint
from sushi_research.runs.job import Job, agree
from sushi_research.runs.tracking import MetricsFile
from sushi_research.sampling import plots, sample_grids
from sushi_research.terminal import say
from sushi_research.training import evaluation_records
from sushi_research.training.identity_facts import drift_set_of, hashes_of, provenance_of, validation_set_of
from sushi_research.training.plan import Plan


@dataclass(frozen=True)
class RunState:
    """The state of a run at launch: whether there is nothing to do, and the step and checkpoint to continue from.

    `validation_set` is None if the run is not evaluated, `drift_set` if its drift is not measured. `provenance` is the entry of
    this launch.
    """

    nothing_to_do: bool
    step: int
    checkpoint: Checkpoint | None
    identity: dict[str, Any]
    hashes: dict[str, Any]
    validation_set: ValidationSet | None
    drift_set: DriftSet | None
    provenance: dict[str, Any]


def start_or_resume(job: Job, inputs: Inputs, plan: Plan) -> RunState:
    """Decides whether the run starts, continues or is finished (run_folder.decide), and prints the decision.

    Then writes config.yaml, plan.json, data_report.json, validation_set.json and provenance.json, and drops metrics, results
    and samples from after the checkpoint, and results of another validation set or drift set. Warns about that, and about changes
    in code, libraries and machine since the launch that saved it.

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
    if config.lora.dropout:
        facts["dropout_split"] = plan.split
    if base.prediction != Prediction():
        facts["prediction"] = asdict(base.prediction)
    settings = identity.run_identity(config_to_dict(config), facts)
    val_set = validation_set_of(job, inputs, hashes["base_model"]["unet"])
    drift_set = drift_set_of(job, inputs, hashes["base_model"]["unet"])
    entry = provenance_of(job, inputs, hashes, val_set, settings)
    outcome: list[Any] = [None]
    error = None
    if accelerator.is_main_process:
        try:
            record, checkpoint = _stored(job, inputs, plan.steps)
            decision = run_folder.decide(run.name, record, checkpoint, settings, plan.steps)
            warnings = list(decision.warnings)
            if decision.action == "continue":
                earlier = provenance.launches(provenance.entries(run.provenance), checkpoint.step)
                warnings += provenance.changes(earlier[-1] if earlier else None, entry)
            if decision.action != "start":
                warnings += evaluation_records.changes(run, val_set, drift_set, decision.action == "nothing")
        except UserError as found:
            error = found
        else:
            if decision.action != "start":
                _complete_pictures(job, inputs, is_finished=decision.action == "nothing")
            say(decision.sentence)
            for warning in warnings:
                say(f"warning: {warning}")
            outcome = [(decision.action, checkpoint.path.name if checkpoint else None)]
    agree(error)
    action, name = broadcast_object_list(outcome)[0]
    checkpoint = read_checkpoint(run.checkpoints / name) if name and action == "continue" else None
    step = checkpoint.step if checkpoint else 0
    state = RunState(
        action == "nothing", step, checkpoint, settings, hashes, val_set, drift_set, entry | {"step": step}
    )
    if not state.nothing_to_do:
        with job.main_process_writes():
            if job.is_main:
                _describe_run(job, state, inputs.data, plan)
    return state


def _complete_pictures(job: Job, inputs: Inputs, is_finished: bool) -> None:
    """Makes those missing pictures of the run that need no model: grids of existing images, and a finished run's curves."""
    run, rows = job.run, sample_grids.rows_of(job.config, inputs.prompts)
    with plots.optional("the run is still without it"):
        sample_grids.complete_grids(run.samples, rows)
        if is_finished and not run.curves.exists():
            plots.training_curves(MetricsFile(run.metrics).read(), run.curves, run.name)


def _stored(job: Job, inputs: Inputs, steps: int) -> tuple[dict[str, Any] | None, Checkpoint | None]:
    """(run.json, newest intact checkpoint) of the run folder, with their identities in the keys of this version."""
    run, defaults = job.run, default_values(type(job.config))
    checkpoint, record = latest_checkpoint(run.checkpoints), run.record()
    if record is not None:
        record["identity"] = identity.in_this_version(record["identity"], defaults)
        rows = sample_grids.rows_of(job.config, inputs.prompts)
        has_all = run.adapter.is_file() and sample_grids.has_samples(run.samples, steps, rows)
        if checkpoint is not None and checkpoint.step == steps and not has_all:
            # The adapter file or the last samples were removed, or could not be written: they are made from the last checkpoint.
            record["finished_at"] = None
    if checkpoint is not None:
        facts = {"identity": identity.in_this_version(checkpoint.facts["identity"], defaults)}
        checkpoint = replace(checkpoint, facts=checkpoint.facts | facts)
    return record, checkpoint


def _describe_run(job: Job, state: RunState, data: Data, plan: Plan) -> None:
    run = job.run
    assert run is not None
    write_atomic(run.config, config_to_yaml(job.config).encode())
    write_json(run.plan, plan.to_json())
    dataset.write_report(data.scan, run.data_report, data.evaluation_scan)
    if state.validation_set:
        write_json(run.validation_set, state.validation_set.describe())
    provenance.add_entry(run.provenance, state.provenance)
    kept = state.step if state.checkpoint else -1
    evaluation_records.cut_back(run, state.validation_set, state.drift_set, kept)
    sample_grids.cut_back(run.samples, kept)
    if state.checkpoint is None:
        run.mark_started(state.identity, plan.steps)
    else:
        run.mark_continued(plan.steps, state.identity)
