"""One call of the system fails, once: a run says so in one sentence or does without, and the next one ends with the same adapter."""

import pytest
from failing_calls import failing
from script_runs import assert_equal

from sushi_research.errors import UserError

ONE = pytest.mark.parametrize("architecture", ["sd15"])
EVERYTHING = {
    "train.steps": 2,
    "evaluation.held_out": 0.25,
    "evaluation.noise_samples": 4,
    "evaluation.drift_captions": ["a plain wall"],
    "sample.enabled": True,
    "sample.prompts": ["a cat"],
    "sample.steps": 1,
    "checkpoint.keep": 1,
}
# (kind, number of the call, what the error says; None: the run does without). All calls of each kind were tried once by hand.
CALLS = [
    ("truncate", 1, None),  # the note in .lock
    ("mkdir", 2, "cannot make the run folder|cannot make the folder|cannot use"),
    ("list", 9, None),
    ("fsync", 14, "cannot write .*: Input/output error; check the disk"),
    ("write", 6, "cannot write .*: No space left on device; free some space"),
    ("create", 12, "Input/output error; check the disk"),
    ("rename", 9, "cannot write .*: Input/output error"),
    ("stat", 60, "Input/output error"),
]


@ONE
def test_a_run_with_a_failing_call_can_be_finished(trainer, with_curves, tmp_path):
    trainer.train("whole", EVERYTHING)
    run = trainer.folder("run")
    for kind, number, message in CALLS:
        fault = failing(kind, number, run)
        error = None
        try:
            with fault():
                trainer.train("run", EVERYTHING)
        except UserError as found:
            error = str(found)
        assert fault.path, f"{kind}: there are only {fault.count} calls"
    trainer.train("run", EVERYTHING)
    assert_equal(trainer.adapter("run"), trainer.adapter("whole"))
