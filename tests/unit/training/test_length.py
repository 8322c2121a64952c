"""The length of a run and of its parts: steps, epochs and fractions of the run."""

from fractions import Fraction

import pytest
from pydantic import TypeAdapter, ValidationError

from sushi_research.config.section import Every, Warmup, steps_text
from sushi_research.errors import UserError
from sushi_research.training.length import Interval, interval_of, steps_of, warmup_steps
from sushi_research.training.parameter_groups import Group, Rates


@pytest.mark.parametrize(
    ("steps", "epochs", "items", "global_batch_size", "expected"),
    [(7, None, 100, 4, 7), (None, 1, 8, 4, 2), (None, 1, 9, 4, 3), (None, 3, 9, 4, 7), (None, 1, 1, 64, 1)],
)
def test_the_number_of_steps(steps, epochs, items, global_batch_size, expected):
    assert steps_of(steps, epochs, items, global_batch_size) == expected


# (value of `every`, steps of the run, images, samples of a step) and the steps at which it is due.
DUE = [
    ((3, 10, 7, 2), [3, 6, 9]),
    ((None, 10, 7, 2), []),
    (
        ("1 epoch", 11, 7, 2),
        [4, 7, 11],
    ),  # an epoch is 3.5 steps; with the end of each, all images have been used once more
    (("0.5 epochs", 7, 7, 2), [2, 4, 6, 7]),  # 1.75 steps
    (("1 epoch", 4, 1, 4), [1, 2, 3, 4]),  # a step is four epochs, and has one event
    ((0.1, 20, 7, 2), [2, 4, 6, 8, 10, 12, 14, 16, 18, 20]),
    ((0.3, 10, 7, 2), [3, 6, 9]),  # as a float, 0.3 x 10 x 3 is more than 9 by rounding
]


@pytest.mark.parametrize(("given", "due"), DUE)
def test_when_something_is_due(given, due):
    every, steps, items, global_batch_size = given
    interval = interval_of(every, steps, items, global_batch_size)
    assert [step for step in range(1, steps + 1) if interval.at(step)] == due
    for after in range(steps + 2):
        assert interval.count(after, steps) == sum(step > after for step in due)


def test_every_epoch_ends_at_an_event():
    """Also the last one, at the end of the run, for each number of images and size of a step."""
    for items in range(1, 12):
        for global_batch_size in range(1, 12):
            steps = steps_of(None, 3, items, global_batch_size)
            interval = Interval(Fraction(items, global_batch_size))
            ends = {steps_of(None, epochs, items, global_batch_size) for epochs in (1, 2, 3)}
            assert {step for step in range(1, steps + 1) if interval.at(step)} == ends


WARMUPS = [
    ((3, 10), 3), ((0, 1), 0), ((0.1, 25), 3), ((0.07, 100), 7), (("1 epoch", 10), 4), (("0.5 epochs", 10), 2),
    ((0.05, 1), 0), ((0.99, 10), 9),  # a fraction of the run ends within it
]  # fmt: skip


@pytest.mark.parametrize(("given", "expected"), WARMUPS)
def test_the_steps_of_a_warmup(given, expected):
    assert warmup_steps(*given, items=7, global_batch_size=2) == expected


@pytest.mark.parametrize(
    ("warmup", "words"), [(10, "is 10 steps, and"), ("3 epochs", "is 3 epochs, which is 11 steps, and")]
)
def test_a_warmup_that_does_not_end_is_refused(warmup, words):
    with pytest.raises(
        UserError, match=f"^schedule.warmup {words} the run has 10: the warm-up must end within the run"
    ):
        warmup_steps(warmup, 10, items=7, global_batch_size=2)


SPELLINGS = [
    (500, 500), (0.25, 0.25), ("500 steps", 500), ("1 step", 1), (" 2Epochs", "2 epochs"), ("1 epoch", "1 epoch"),
    ("1.0 epochs", "1 epoch"), ("0.50 epoch", "0.5 epochs"), (".5 epochs", "0.5 epochs"), ("10 epochs", "10 epochs"),
]  # fmt: skip
REFUSED = [0, -1, 1.0, 0.0, -0.5, "0 epochs", "-1 epoch", "1 epok", "epoch", "2.5 steps", "500", "", "1e3 epochs", True]


def test_each_value_has_one_spelling():
    every = TypeAdapter(Every, config={"strict": True})
    for given, expected in SPELLINGS:
        found = every.validate_python(given)
        assert found == expected and type(found) is type(expected)
        assert every.validate_python(found) == found  # config.yaml is read again
    for given in REFUSED:
        with pytest.raises(ValidationError):
            every.validate_python(given)
            pytest.fail(f"{given!r} was accepted")
    warmup = TypeAdapter(Warmup, config={"strict": True})
    assert [warmup.validate_python(none) for none in (0, 0.0, "0 steps", "0 epochs")] == [0, 0, 0, 0]


def test_one_step_is_no_steps():
    assert [steps_text(number) for number in (0, 1, 2)] == ["0 steps", "1 step", "2 steps"]
    with pytest.raises(UserError, match="^schedule.warmup is 1 epoch, which is 1 step, and the run has 1"):
        warmup_steps("1 epoch", 1, 4, 4)
    groups = (Group(("a",), 1.0, "unet", "unet", None), Group(("b",), 1.0, "text_encoder", "text_encoder", 1))
    assert "text_encoder 0.1 for 1 step (" in Rates(0.1, groups).describe()[0]
