"""How a run begins or continues: what it is, where it stands, and the files that say so.

The policy is run_folder's (`decide`); here its question is put, its answer said, and the run folder made to fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from sushi_research import randomness
from sushi_research.caches.caches import Caches
from sushi_research.config import TrainingConfig
from sushi_research.config.command_line import config_to_dict, config_to_yaml
from sushi_research.data import dataset
from sushi_research.data.training_data import Data
from sushi_research.errors import UserError
from sushi_research.evaluation.results import Results
from sushi_research.evaluation.validation_set import Pack
from sushi_research.files import write_atomic, write_json
from sushi_research.fingerprints import FileMemo
from sushi_research.models import loading
from sushi_research.models.prediction import Prediction
from sushi_research.runs import identity, provenance, run_folder, tracking
from sushi_research.runs.checkpoint import Checkpoint, latest_checkpoint, read_checkpoint
from sushi_research.runs.run_folder import RunFolder
from sushi_research.sampling import sample_grids
from sushi_research.training.identity_facts import hashes_of, make_pack, provenance_of


@dataclass(frozen=True)
class Start:
    """Where a run stands: nothing to do, or the step to begin at with the state of the checkpoint that it continues from.

    `pack` is what it is evaluated on, None where it is not; `provenance` is the entry of this start.
    """

    nothing_to_do: bool
    step: int
    checkpoint: Checkpoint | None
    identity: dict[str, Any]
    hashes: dict[str, Any]
    pack: Pack | None
    provenance: dict[str, Any]


def begin(
    config: TrainingConfig,
    run: RunFolder,
    base: loading.Base,
    model: ModuleType,
    data: Data,
    caches: Caches,
    plan: Mapping[str, Any],
    memo: FileMemo,
    precision: str,
    accelerator: Accelerator,
) -> Start:
    """Decides whether the run begins, continues or is finished (run_folder.decide), says so, and writes what describes it:
    config.yaml, plan.json, data_report.json, evaluation_pack.json, provenance.json, and what was logged and evaluated cut
    back to the checkpoint. Says what of code, libraries and machine is not as it was when the run was last started.

    Raises UserError, leaving everything as it was, when the run folder holds a run with another identity.
    """
    hashes = hashes_of(base, model, data, memo, accelerator)
    facts = hashes | {
        "samples_per_step": plan["samples_per_step"],
        "precision": precision,
        "random_scheme": randomness.SCHEME,
        "vae_dtype": plan["dtypes"]["VAE"],
    }
    if config.lora.dropout:
        facts["dropout_split"] = plan["split"]
    if base.prediction != Prediction():
        facts["prediction"] = asdict(base.prediction)
    settings = identity.run_identity(config_to_dict(config), facts)
    pack = make_pack(config, base, data, caches, hashes["base_model"]["unet"])
    entry = provenance_of(config, base, data, caches, hashes, pack, settings, precision, accelerator)
    outcome: list[Any] = [None]
    error = None
    if accelerator.is_main_process:
        try:
            checkpoint = latest_checkpoint(run.checkpoints)
            decision = run_folder.decide(run.name, run.record(), checkpoint, settings, plan["steps"])
            warnings = list(decision.warnings)
            if decision.action == "continue":
                warnings += provenance.changes(provenance.last_entry(run.provenance), entry)
                if pack and Results(run.evaluation).is_of_another(pack):
                    warnings.append("the held-out images are others than before: earlier evaluations are dropped")
        except UserError as found:
            error = found
        else:
            print(decision.sentence, flush=True)
            for warning in warnings:
                print(f"warning: {warning}", flush=True)
            outcome = [(decision.action, checkpoint.path.name if checkpoint else None)]
    agree(error, accelerator)
    action, name = broadcast_object_list(outcome)[0]
    checkpoint = read_checkpoint(run.checkpoints / name) if name and action == "continue" else None
    step = checkpoint.step if checkpoint else 0
    start = Start(action == "nothing", step, checkpoint, settings, hashes, pack, entry | {"step": step})
    if accelerator.is_main_process and not start.nothing_to_do:
        _describe_run(config, run, start, data, plan)
    return start


def _describe_run(config: TrainingConfig, run: RunFolder, start: Start, data: Data, plan: Mapping[str, Any]) -> None:
    write_atomic(run.config, config_to_yaml(config).encode())
    write_json(run.plan, plan)
    dataset.write_report(data.scan, run.data_report)
    if start.pack:
        write_json(run.evaluation_pack, start.pack.describe())
    provenance.add_entry(run.provenance, start.provenance)
    kept = start.step if start.checkpoint else -1
    metrics, results = tracking.MetricsFile(run.metrics), Results(run.evaluation)
    other_pack = start.checkpoint is not None and start.pack is not None and results.is_of_another(start.pack)
    metrics.cut_back(kept, without="evaluation/loss" if other_pack else None)
    results.cut_back(-1 if other_pack else kept)
    Results(run.drift).cut_back(-1 if other_pack else kept)
    sample_grids.cut_back(run.samples, kept)
    if start.checkpoint is None:
        run.mark_begun(start.identity, plan["steps"])
    else:
        run.mark_continued(plan["steps"])


def agree(error: UserError | None, accelerator: Accelerator) -> None:
    """Ends all processes when the main one met a user's mistake: it raises and says it, the others end in silence.

    Without this they would wait for it in vain, and end in a traceback of the network library.
    """
    told = broadcast_object_list([error is not None])[0]
    if error is not None:
        raise error
    if told:
        raise SystemExit(2)
