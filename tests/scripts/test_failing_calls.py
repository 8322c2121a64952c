"""One call of the system fails, once: a run says so in one sentence or does without, and the next ends with the same adapter."""

import pytest
from failing_calls import failing
from script_runs import assert_equal

from sushi_research.errors import UserError

ONE = pytest.mark.parametrize("architecture", ["sd15"])
SETTINGS = {
    "train.steps": 2,
    "evaluation.held_out": 0.25,
    "evaluation.noise_samples": 4,
    "evaluation.drift_captions": ["a plain wall"],
    "checkpoint.keep": 1,
}
# (kind, number). Each command goes on where the one before ended; without the note in .lock (truncate) a run goes on.
CALLS = [("create", 3), ("rename", 5), ("fsync", 20), ("truncate", 1)]


@ONE
@pytest.mark.slow
def test_a_run_with_failing_calls_can_be_finished(trainer):
    trainer.train("whole", SETTINGS)
    sentences = []
    for kind, number in CALLS:
        fault = failing(kind, number, trainer.folder("run"))
        try:
            with fault():
                trainer.train("run", SETTINGS)
        except UserError as error:
            sentences.append(str(error))
        assert fault.path, f"{kind}: there are only {fault.count} calls"
    trainer.train("run", SETTINGS)
    assert_equal(trainer.adapter("run"), trainer.adapter("whole"))
    assert len(sentences) == 3, sentences
    for sentence in sentences:
        assert "\n" not in sentence and "Input/output error; check the disk" in sentence
