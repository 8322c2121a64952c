"""Micro-batches from recordings: made once per shape, compared, released, and given up where that is not possible.

`Rerun` stands in for CUDA graphs, and a small function for the step.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch
from made_batches import batch_of

from sushi_research.fast.recording import Recorder, StepBuffers
from testing.rerun import Rerun


@dataclass
class Case:
    """A step that adds to a gradient and two sums, and its recorder; `fail` and `spoil` are called in the step and at its end."""

    most: int = 32
    tight: bool = False
    fail: object = None
    spoil: object = None
    lines: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.gradient, self.losses, self.sums = torch.zeros(3), torch.zeros(4), torch.zeros(2)
        self.discarded = 0
        buffers = StepBuffers([self.gradient], self.losses, [self.sums], self.discard, lambda: None)
        self.graphs = Rerun(buffers.all, tight=self.tight)
        self.recorder = Recorder(self.step, buffers, self.graphs, say=self.lines.append, most=self.most)

    def discard(self):
        self.discarded += 1

    def step(self, batch):
        noise = batch.normal("noise")
        dropped = torch.nn.functional.dropout(noise, 0.5)
        if self.fail is not None:
            self.fail(batch)
        losses = (batch.mean * noise).flatten(1).mean(1) + batch.step
        self.losses[: len(batch)].copy_(losses)
        self.sums[0] += losses.sum()
        self.sums[1] += batch.integers("timestep", 1000).sum()
        self.gradient += torch.stack([losses.sum(), dropped.sum(), batch.std.sum()])
        if self.spoil is not None:
            self.spoil(batch)

    def run(self, batches):
        """What the buffers hold after each of the batches."""
        found = []
        for number, batch in enumerate(batches):
            torch.manual_seed(number)
            self.recorder(batch)
            found.append([each.clone() for each in (self.gradient, self.losses, self.sums)])
        return found


def is_static(batch):
    return not hasattr(batch, "names")


def assert_same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert all(map(torch.equal, one, other))


def eager(batches):
    return Case(most=0).run(batches)


# Micro-batches of two shapes, in turn.
BATCHES = [batch_of(number, size=1 + number % 2) for number in range(6)]


def test_recorded_micro_batches_add_up_to_the_same_as_eager_ones():
    case = Case()
    assert_same(case.run(BATCHES), eager(BATCHES))
    assert (case.graphs.made, case.graphs.replayed, case.lines) == (2, 6, [])


def test_beyond_the_most_shapes_the_same_code_runs_unrecorded_and_one_line_says_so():
    case, batches = Case(most=2), [batch_of(number, size=1 + number % 4) for number in range(8)]
    assert_same(case.run(batches), eager(batches))
    assert (case.graphs.made, case.graphs.replayed) == (2, 4)
    assert len(case.lines) == 1 and "2 shapes of micro-batches are recorded" in case.lines[0]


def test_a_step_that_reads_what_is_no_tensor_runs_unrecorded_and_says_why():
    case = Case(fail=lambda batch: batch.names)
    assert_same(case.run(BATCHES), eager(BATCHES))
    assert case.graphs.made == 0
    assert len(case.lines) == 2 and "a recorded step cannot read batch.names" in case.lines[0]
    assert "1 of 48x32" in case.lines[0] and "2 of 48x32" in case.lines[1]


def test_a_capture_that_fails_leaves_nothing_behind():
    case, seen = Case(), []

    def fail(batch):
        if is_static(batch) and len(batch) == 2:
            seen.append(batch)
            if len(seen) == 2:  # the first is the run before the capture
                raise RuntimeError("operation not permitted when stream is capturing\nmore")

    case.fail = fail
    assert_same(case.run(BATCHES), eager(BATCHES))
    assert case.lines == [
        "micro-batches like 2 of 48x32 run unrecorded: RuntimeError: operation not permitted when stream is capturing"
    ]
    # The recording of the first shape is made anew: torch does not keep earlier ones right through a capture that fails.
    assert (case.graphs.made, case.graphs.released) == (2, 1) and case.discarded >= 1


@pytest.mark.parametrize(("buffer", "says"), [("losses", "the losses"), ("gradient", "a gradient that is off by")])
def test_a_recording_that_computes_something_else_is_not_used(buffer, says):
    case, seen = Case(), []

    def spoil(batch):
        if is_static(batch):
            seen.append(batch)
            if len(seen) % 3 == 0:  # after the run before the capture, and the capture
                getattr(case, buffer).add_(1000.0)

    case.spoil = spoil
    assert_same(case.run(BATCHES), eager(BATCHES))
    assert case.graphs.replayed == 2 and len(case.lines) == 2
    assert all(says in line for line in case.lines)


def test_memory_that_does_not_suffice_beside_the_recordings_is_made_free_once():
    case, refused = Case(), []

    def fail(batch):
        # The second shape does not fit beside the recording of the first.
        if len(batch) == 1 and case.graphs.released == 0 and case.graphs.made == 1:
            refused.append(batch)
            raise torch.OutOfMemoryError("CUDA out of memory")

    case.fail = fail
    batches = BATCHES[1:]
    assert_same(case.run(batches), eager(batches))
    assert len(refused) == 1 and case.graphs.released == 1 and case.lines == []
    assert case.graphs.made == 3  # the first shape once more
    assert case.discarded == 3  # before each first replay, and before the second attempt


def test_unrecorded_micro_batches_that_need_the_memory_end_all_recording():
    case = Case(most=1)

    def fail(batch):
        if len(batch) == 2 and case.graphs.released == 0:
            case.gradient += 1  # what it did before the memory ran out counts for nothing
            raise torch.OutOfMemoryError("CUDA out of memory")

    case.fail = fail
    assert_same(case.run(BATCHES), eager(BATCHES))
    assert case.graphs.made == 1 and case.graphs.replayed == 1
    assert case.lines[-1].endswith("all run unrecorded from here on")


def test_too_little_memory_for_one_micro_batch_is_an_error():
    case = Case()

    def fail(batch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    case.fail = fail
    with pytest.raises(torch.OutOfMemoryError):
        case.recorder.try_out(BATCHES[0])


@pytest.mark.parametrize("most", [0, 32])
def test_a_trial_changes_nothing(most):
    case = Case(most=most)
    case.gradient += 5
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert case.recorder.try_out(BATCHES[1]) is None
    assert torch.equal(torch.get_rng_state(), state)
    assert case.gradient.tolist() == [5, 5, 5] and not case.sums.any() and not case.losses.any()
    case.gradient -= 5
    assert_same(case.run(BATCHES), eager(BATCHES))
    assert case.graphs.made == (2 if most else 0)


def test_a_trial_that_cannot_be_recorded_says_why_and_all_is_eager():
    case = Case(fail=lambda batch: batch.keys)
    assert "cannot read batch.keys" in case.recorder.try_out(BATCHES[1])
    assert_same(case.run(BATCHES), eager(BATCHES))
    assert case.graphs.made == 0 and case.lines == []


@pytest.mark.parametrize("tight", [False, True])
def test_recordings_are_released_where_memory_is_tight_and_made_again(tight):
    case = Case(tight=tight)
    found = case.run(BATCHES[:3])
    case.recorder.make_room()
    assert case.graphs.released == tight
    for each in (case.gradient, case.losses, case.sums):
        each.copy_(found[-1][[3, 4, 2].index(len(each))])
    found += case.run(BATCHES[3:])
    case.recorder.make_room()
    expected = Case(most=0)
    assert_same(found, expected.run(BATCHES[:3]) + expected.run(BATCHES[3:]))
    assert case.graphs.made == (4 if tight else 2)


def test_gradients_that_overflow_are_not_compared():
    case = Case(fail=lambda batch: case.gradient.add_(float("inf") * batch.std.sum()))
    case.recorder(replace(BATCHES[0]))
    assert case.lines == [] and case.graphs.made == 1 and not case.gradient.isfinite().any()
