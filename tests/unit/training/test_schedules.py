"""Learning rates as functions of the step."""

import re

import pytest
import torch
from torch import nn

from sushi_research.errors import UserError
from sushi_research.training.length import decay_steps
from sushi_research.training.schedules import OF_DIFFUSERS, SCHEDULES, make_schedule

STEPS = 40


def rates(name, **options):
    rate = make_schedule(name, **{"lr": 3e-4, "total_steps": STEPS, "warmup": 0} | options)
    return [rate(step) for step in range(STEPS)]


def stepped(make, lr=3e-4):
    """The learning rates of a run that steps a library's scheduler once per optimizer step."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = make(optimizer)
    found = []
    for _ in range(STEPS):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_all_of_diffusers_schedules_but_the_piecewise_one():
    from diffusers.optimization import SchedulerType

    assert {*OF_DIFFUSERS, "piecewise_constant"} == {name.value for name in SchedulerType}


def test_a_schedule_is_what_stepping_diffusers_gives():
    from diffusers.optimization import get_scheduler

    for name in OF_DIFFUSERS:
        for warmup in {0, 0 if name == "constant" else 7}:
            found = rates(name, warmup=warmup, cycles=3, power=2.0)
            theirs = {"num_warmup_steps": warmup, "num_training_steps": STEPS, "num_cycles": 3, "power": 2.0}
            assert found == stepped(lambda optimizer: get_scheduler(name, optimizer, **theirs)), (name, warmup)  # noqa: B023
            assert (max(found), found[0]) == (3e-4, 0.0 if warmup else 3e-4), (name, warmup)


def test_wsd_and_inverse_sqrt_are_what_stepping_transformers_gives():
    from transformers.optimization import get_inverse_sqrt_schedule, get_wsd_schedule

    found = rates("wsd", warmup=4, decay=10)
    assert found == stepped(lambda each: get_wsd_schedule(each, 4, 10, STEPS, decay_type="1-sqrt"))
    assert found[0] == 0 and found[4:31] == [3e-4] * 27  # the decay begins with the whole rate
    assert found[30 + 5] == pytest.approx(3e-4 * (1 - 0.5**0.5)) and 0 < found[-1] < found[-2]
    assert rates("inverse_sqrt", warmup=4) == stepped(lambda each: get_inverse_sqrt_schedule(each, 4))
    found = rates("inverse_sqrt", timescale=12)
    assert found == stepped(lambda each: get_inverse_sqrt_schedule(each, 0, 12))
    assert found[0] == 3e-4 and found[12] == pytest.approx(3e-4 / 2**0.5)


def test_rex_is_the_profile_of_its_paper():
    """(1 - z) / (1/2 + 1/2 (1 - z)): two thirds at half of the run, after the warm-up."""
    found = rates("rex", warmup=8, lr=1.0)
    assert found[:9] == [step / 8 for step in range(9)]
    for step in range(8, STEPS):
        z = (step - 8) / (STEPS - 8)
        assert found[step] == pytest.approx((1 - z) / (1 - z / 2), rel=1e-12), step
    assert found[24] == pytest.approx(2 / 3) and found[-1] > 0


def test_the_range_test_rises_by_the_same_factor_in_each_step():
    found = rates("range_test", lr=2.0, span=1e6)
    assert found[0] == pytest.approx(2e-6) and found[-1] == 2.0
    factors = [later / earlier for earlier, later in zip(found, found[1:], strict=False)]
    assert factors == pytest.approx([1e6 ** (1 / (STEPS - 1))] * (STEPS - 1))


def test_a_schedule_has_no_state():
    for name in SCHEDULES:
        options = {"lr": 1.0, "total_steps": STEPS, "warmup": 0, "decay": 9, "timescale": 9, "span": 10.0}
        rate = make_schedule(name, **options)
        found = [rate(step) for step in reversed(range(STEPS))][::-1]
        assert found == [rate(step) for step in range(STEPS)], name
        assert max(found) == 1.0, name


def test_the_options_have_an_effect():
    assert rates("polynomial", power=2.0) != rates("polynomial")
    assert rates("cosine_with_restarts", cycles=3) != rates("cosine_with_restarts")


IMPOSSIBLE = [
    ({"name": "cosinus"}, "cosinus is not a schedule (did you mean cosine?): choose from constant, "),
    ({"name": "piecewise_constant"}, "piecewise_constant is not a schedule"),
    ({"name": "polynomial", "lr": 1e-8}, "the schedule polynomial refuses its values (lr_end"),
    ({"name": "inverse_sqrt"}, "schedule.timescale is not set, and inverse_sqrt has no warm-up"),
]


def test_schedules_that_cannot_be():
    for options, sentence in IMPOSSIBLE:
        with pytest.raises(UserError, match="^" + re.escape(sentence)):
            make_schedule(**{"name": "linear", "lr": 1.0, "total_steps": 10, "warmup": 0} | options)
            pytest.fail(f"{options} was accepted")
    with pytest.raises(UserError, match="range_test has no range in 1 step"):
        make_schedule("range_test", lr=1.0, total_steps=1, warmup=0, span=10)(0)


def test_the_decay_fits_into_the_run():
    assert decay_steps(0.2, 99, 10, 2, 0) == 20 and decay_steps("1 epoch", 99, 10, 2, 0) == 5
    assert decay_steps(0.9, 100, 10, 2, 10) == 90
    with pytest.raises(
        UserError, match=r"^schedule.decay is 0.9, which is 90 steps, and the run has 100, 11 of them for the"
    ):
        decay_steps(0.9, 100, 10, 2, 11)
