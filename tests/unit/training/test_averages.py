"""Averages of the master weights in flat buffers: their values, the block in which one is used, and their state."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sushi_research.adapters.averaging import exponent_of, exponential_decay, power_decay
from sushi_research.config.ema import EmaSection
from sushi_research.training.averages import EXPONENTIAL, averages_of
from sushi_research.training.master_weights import MasterWeights

BOTH = EmaSection(decay=0.9, post_hoc=True, evaluate=True)


@pytest.fixture
def master_weights() -> MasterWeights:
    generator = torch.Generator().manual_seed(0)
    working = {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}
    return MasterWeights(working, torch.bfloat16, [["b"], ["a", "c"]])


SHAPES = {"a": (3, 4), "b": (5,), "c": (2, 2, 1, 1)}
DECAYS = {
    EXPONENTIAL: lambda step: exponential_decay(step, 0.9),
    "0.05": lambda step: power_decay(step, exponent_of(0.05)),
    "0.10": lambda step: power_decay(step, exponent_of(0.10)),
}


def walk(master_weights: MasterWeights, seed: int) -> dict[str, torch.Tensor]:
    """Another value for every number; returns an fp64 copy by name."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for flat in master_weights.flat_parameters():
            flat.add_(torch.randn(flat.shape, generator=generator))
    return {name: tensor.double() for name, tensor in master_weights.named_state().items()}


def test_values_by_name_and_the_block_that_uses_one(master_weights):
    averages = averages_of(BOTH, master_weights)
    before = master_weights.named_state()
    assert all(torch.equal(averages.named_state(EXPONENTIAL)[name], before[name]) for name in SHAPES), "before step 1"
    expected = {name: {} for name in DECAYS}
    for step in range(1, 41):
        weights = walk(master_weights, step)
        averages.update(step)
        for name, decay_of in DECAYS.items():
            decay = decay_of(step)
            expected[name] = {
                key: value if step == 1 else decay * expected[name][key] + (1 - decay) * value
                for key, value in weights.items()
            }
    for name, tensors in expected.items():
        for key, tensor in averages.named_state(name).items():
            # fp32 sums over 40 steps.
            torch.testing.assert_close(tensor.double(), tensors[key], rtol=1e-5, atol=1e-5)

    trained = master_weights.named_state()
    with averages.used():
        used = master_weights.named_state()
        assert averages.in_use == EXPONENTIAL
        assert all(torch.equal(used[key], averages.named_state(EXPONENTIAL)[key]) for key in SHAPES)
        assert torch.equal(master_weights._copy, master_weights.values.bfloat16()), "the UNet computes with it"
    assert averages.in_use is None
    assert all(torch.equal(master_weights.named_state()[key], trained[key]) for key in SHAPES)
    assert torch.equal(master_weights._copy, master_weights.values.bfloat16())


def test_the_state_goes_on_bit_for_bit_and_another_one_is_named(master_weights):
    averages = averages_of(BOTH, master_weights)
    walk(master_weights, 0)
    averages.update(1)
    saved = {name: {key: tensor.clone() for key, tensor in each.items()} for name, each in averages.state().items()}
    walk(master_weights, 1)
    averages.update(2)
    assert not torch.equal(averages.named_state("0.05")["a"], saved["0.05"]["a"])
    averages.load(saved)
    assert all(torch.equal(averages.named_state(name)[key], saved[name][key]) for name in saved for key in SHAPES)

    assert averages.problem_of(None) == "it lacks the averages exponential, 0.05, 0.10"
    assert averages.problem_of({EXPONENTIAL: saved[EXPONENTIAL]}) == "it lacks the averages exponential, 0.05, 0.10"
    wrong = saved | {"0.10": saved["0.10"] | {"c": torch.zeros(2, 2)}}
    assert averages.problem_of(wrong) == "of its averages, its c is not float32 of [2, 2, 1, 1]"
    assert averages_of(EmaSection(), master_weights) is None
