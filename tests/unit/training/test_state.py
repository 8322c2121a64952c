"""The state of a training: steps that fp16 skips, and what is logged about the optimizer."""

import pytest
import torch
from torch import nn

from sushi_research.errors import NotFinite, UserError
from sushi_research.precision import make_scaler
from sushi_research.training import optim
from sushi_research.training.master_weights import MasterWeights
from sushi_research.training.state import TrainState

CPU = torch.device("cpu")


def state_of(precision: str = "fp16") -> TrainState:
    master_weights = MasterWeights({"a": nn.Parameter(torch.ones(3))}, torch.float32)
    optimizer = optim.build_optimizer("adamw", master_weights, 0.1, {})
    return TrainState(master_weights, optimizer, make_scaler(precision, CPU))


def take_step(state: TrainState, step: int, gradient: float, steps: int = 100) -> None:
    (parameter,) = state.master_weights.parameters()
    state.scaler.scale(torch.ones(()))  # as for the loss
    parameter.grad.fill_(gradient)
    state.scaler.unscale_(state.optimizer)
    state.step_optimizer(step, steps)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gradients_that_overflow_at_every_scale_stop_the_run(bad):
    """The scale goes from 2^16 to 1, which takes 16 steps."""
    state = state_of()
    for step in range(1, 17):
        take_step(state, step, bad)
        assert state.metrics() == {"skipped_steps": step}
    assert state.scaler.get_scale() == 1
    with pytest.raises(
        NotFinite, match="step 17 overflow fp16 even at a loss scale of 1, after 16 skipped steps: the last"
    ):
        take_step(state, 17, bad)
    assert state.master_weights.parameters()[0].tolist() == [1, 1, 1]


def test_a_scale_that_fits_lets_the_run_go_on():
    state = state_of()
    for step in range(1, 17):
        take_step(state, step, float("inf"))
    for step in range(17, 20):
        take_step(state, step, 1.0)
    assert state.skipped_steps == 16
    assert state.master_weights.parameters()[0].max() < 1


def test_a_run_that_skipped_every_step_has_learned_nothing():
    state = state_of()
    take_step(state, 1, float("nan"), steps=2)
    with pytest.raises(UserError, match="fp16 skipped all 2 steps .*the loss scale is 16384 now"):
        take_step(state, 2, float("nan"), steps=2)
    state = state_of()
    take_step(state, 1, 1.0, steps=2)
    take_step(state, 2, float("nan"), steps=2)


def test_other_precisions_count_nothing():
    state = state_of("bf16")
    take_step(state, 1, 1.0)
    assert state.metrics() == {}


def test_the_rate_of_prodigy_is_its_estimate_times_the_schedule():
    """prodigyopt and dadaptation keep the estimate as `d` of the parameter group."""
    state = state_of("fp32")
    state.optimizer.param_groups[0]["d"] = 1e-6
    assert optim.set_learning_rate(state.optimizer, 0.5) == 0.5e-6
    assert state.optimizer.param_groups[0]["lr"] == 0.5
    state.optimizer.param_groups[0]["d"] = torch.tensor(2.0)
    assert state.metrics() == {"d": 2.0}
