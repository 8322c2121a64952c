"""Bytes of an optimizer's state, which a plan counts."""

import pytest

from sushi_research.config.learning import OptimizerSection
from sushi_research.training.step_costs import state_bytes


@pytest.mark.parametrize(
    ("name", "kwargs", "expected"),
    [
        ("adamw", {}, 8),
        ("adamw", {"weight_decay": 0.1}, 8),
        ("adamw", {"amsgrad": True}, 12),
        ("adamw8bit", {"weight_decay": 0.1}, 2.03),
        ("adamw8bit", {"min_8bit_size": 10**8}, 8),
        ("torch.optim.SGD", {}, 0),
        ("torch.optim.SGD", {"momentum": 0.9}, 4),
    ],
)
def test_state_by_name_and_arguments(name, kwargs, expected):
    assert state_bytes(OptimizerSection(name=name, kwargs=kwargs)) == pytest.approx(expected, abs=0.05)
