"""One call of the system fails, once: a run says so in one sentence or does without, and the next ends with the same adapter."""

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
# Some of all calls (kind, number). Each was tried once by hand; this run goes on where the one before ended.
CALLS = [("truncate", 1), ("list", 5), ("fsync", 12), ("write", 3), ("create", 8), ("rename", 9), ("stat", 60)]


@ONE
def test_a_run_with_failing_calls_can_be_finished(trainer, with_curves):
    trainer.train("whole", EVERYTHING)
    sentences = []
    for kind, number in CALLS:
        fault = failing(kind, number, trainer.folder("run"))
        try:
            with fault():
                trainer.train("run", EVERYTHING)
        except UserError as error:
            sentences.append(str(error))
        assert fault.path, f"{kind}: there are only {fault.count} calls"
    trainer.train("run", EVERYTHING)
    assert_equal(trainer.adapter("run"), trainer.adapter("whole"))
    assert len(sentences) >= 4 and all("\n" not in sentence for sentence in sentences), sentences
