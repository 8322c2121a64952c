"""Bytes of an optimizer's state, which a plan counts."""

import pytest

from sushi_research.config.learning import OptimizerSection
from sushi_research.training.optimizer_plan import state_bytes


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
    section, shapes = OptimizerSection(name=name, kwargs=kwargs), {"a.lora_A.weight": (256, 256)}
    assert state_bytes(section, shapes) / 256**2 == pytest.approx(expected, abs=0.05)


def test_state_that_depends_on_the_shapes():
    """Rows and columns of each matrix instead of its numbers, and of Muon one average of a matrix, two of a magnitude."""
    shapes = {"a.lora_A.weight": (4, 32), "b.lora_A.weight": (4, 32), "a.magnitude": (1, 10)}
    for name, bytes_of in {
        "adafactor": 2 * 4 * (4 + 32 + 1) + 4 * (1 + 10 + 1),  # and the root mean square of the tensor
        "came": 2 * 4 * (4 * 32 + 2 * (4 + 32) + 1) + 4 * (10 + 2 * (1 + 10) + 1),
        "muon": 2 * 4 * 4 * 32 + 2 * 4 * 10,
    }.items():
        assert state_bytes(OptimizerSection(name=name), shapes) == bytes_of, name
