"""What a command does with its run folder when the run was started before.

`decide` implements this policy:

- no checkpoint yet: the run starts from the beginning, even if it was launched before;
- same identity: the run continues from the newest intact checkpoint;
- a checkpoint but no run.json: the run continues, and run.json is made again;
- other identity: an error that names every differing key, because a run must not change its settings midway;
- finished: nothing is done, and a message says so. If train.steps or train.epochs was raised, or the adapter file, the last
  results or the last pictures are missing or damaged (training/run_outputs.py), the run continues from its last checkpoint.
  If the schedule depends on the run length, a warning says that the earlier steps used learning rates of the old length.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from sushi_research.errors import UserError
from sushi_research.runs.identity import depends_on_length, length_setting, require_same_run

if TYPE_CHECKING:
    from sushi_research.runs.checkpoint import Checkpoint


class Decision(NamedTuple):
    """What a command does with its run folder: the action, a sentence for the user, and warnings."""

    action: Literal["start", "continue", "nothing"]
    sentence: str
    warnings: list[str]


def decide(
    name: str,
    record: dict[str, Any] | None,
    checkpoint: Checkpoint | None,
    identity: dict[str, Any],
    steps: int,
    has_adapter: bool = False,
) -> Decision:
    """Decides what the command does, by the policy at the top of this file.

    `record` is the content of run.json, `checkpoint` the newest intact one, `steps` the run length in optimizer steps;
    `has_adapter`: whether there is an adapter file.
    Both have their identities in the keys of this version (identity.in_this_version).
    Raises UserError if the run cannot continue as requested.
    """
    if checkpoint is None:
        if record is None and has_adapter:
            raise UserError(
                f"the run {name} has an adapter file but neither a run.json nor a checkpoint: restore run.json, move the adapter "
                "file away to train again, or give another --run.name"
            )
        if record is None:
            return Decision("start", f"starting the run {name}", [])
        if record["finished_at"] is None:
            sentence = f"starting the run {name} afresh: there is no checkpoint of its earlier start"
            return Decision("start", sentence, [])
        require_same_run(name, record["identity"], identity)
        if steps > record["finished_at"]:
            raise UserError(
                f"the run {name} finished at step {record['finished_at']} and its checkpoints are gone, "
                f"so it cannot go on to step {steps}; give another --run.name to train again"
            )
        return _nothing_to_do(name, record["finished_at"])

    warnings = []
    if record is not None:
        require_same_run(name, record["identity"], identity)
    require_same_run(name, checkpoint.facts["identity"], identity)
    if record is None:
        warnings.append(f"the run {name} has no run.json: it is made again from the checkpoint, with a new id in W&B")
        if depends_on_length(identity):
            warnings[-1] += (
                f"; the learning rate depends on the run's length ({length_setting(identity)}), which was in that "
                f"file: up to step {checkpoint.step} it followed that length, if it was not {steps} steps"
            )
        record = {"steps": steps, "finished_at": None}
    if record["finished_at"] is not None and steps <= record["finished_at"]:
        return _nothing_to_do(name, record["finished_at"])
    if checkpoint.step > steps:
        raise UserError(
            f"the run {name} is at step {checkpoint.step}, past its end at step {steps}: "
            "raise train.steps or train.epochs, or give another --run.name"
        )
    if steps != record["steps"] and depends_on_length(identity):
        warnings.append(
            f"the length changes from {record['steps']} to {steps} steps, and the learning rate depends on it "
            f"({length_setting(identity)}): up to step {checkpoint.step} it followed the old length"
        )
    return Decision("continue", f"continuing the run {name} from step {checkpoint.step} of {steps}", warnings)


def _nothing_to_do(name: str, step: int) -> Decision:
    sentence = (
        f"the run {name} is finished, at step {step}: there is nothing to do; "
        "raise train.steps or train.epochs to go on, or give another --run.name to train again"
    )
    return Decision("nothing", sentence, [])
