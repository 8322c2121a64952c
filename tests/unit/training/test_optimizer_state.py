"""The state of an optimizer by tensor name: flat or single, it goes out and back bit for bit, and what does not fit is refused."""

import io

import pytest
import torch
from script_runs import assert_equal
from torch import nn

from sushi_research.training import optim
from sushi_research.training.master_weights import MasterWeights
from sushi_research.training.optimizer_state import ForeignState, load_named_state, named_state

# 5,824 numbers: enough for 8-bit states. Blocks of 256 cross the borders of all tensors.
SHAPES = {"a.A": (4, 130), "a.B": (70, 4), "b.A": (4, 8, 3, 3), "b.B": (90, 4, 1, 1), "c.A": (40, 109)}
CASES = {
    "adamw": {},
    "adamw8bit": {},
    "bitsandbytes.optim.Lion": {},
    "bitsandbytes.optim.Lion8bit": {},
    "bitsandbytes.optim.AdEMAMix8bit": {},
    "torch.optim.RMSprop": {"centered": True, "momentum": 0.9},
    "torch.optim.SGD": {},  # without a state
    "schedulefree.AdamWScheduleFree": {},
    "schedule_free.ScheduleFree": {},
    "torch.optim.Adafactor": {},
    "bitsandbytes.optim.AdamW": {"min_8bit_size": 4096},
    f"{__name__}.Wrapped": {},
}


class Wrapped(torch.optim.SGD):
    """Holds another optimizer, as Lookahead does, whose state is all that its `state_dict` has."""

    def __init__(self, params, lr):
        super().__init__(params, lr=lr)
        self.inner = torch.optim.Adam(self.param_groups, lr=lr)

    def step(self, closure=None):
        self.inner.step()

    def state_dict(self):
        return {"inner": self.inner.state_dict()}

    def load_state_dict(self, state):
        self.inner.load_state_dict(state["inner"])


def make(name, kwargs, shapes=SHAPES, groups=None):
    if name.startswith("schedulefree"):
        pytest.importorskip("schedulefree")
    torch.manual_seed(0)
    working = {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
    master_weights = MasterWeights(working, torch.float32, groups)
    return master_weights, optim.build_optimizer(name, master_weights, 1e-2, kwargs)


def train(master_weights, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        gradients = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
        for name, parameter in zip(master_weights.shapes(), master_weights.parameters(), strict=True):
            parameter.grad.copy_(gradients[name])
        optimizer.step()
        master_weights.zero_grad()


def saved(value):
    """The value as a checkpoint gives it back."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("groups", [None, [["b.A", "a.A"], ["c.A", "b.B", "a.B"]]], ids=["one group", "two groups"])
def test_a_state_goes_out_and_back(name, groups):
    whole = make(name, CASES[name], groups=groups)
    train(*whole, range(6))

    first = make(name, CASES[name], groups=groups)
    train(*first, range(3))
    state = saved({"adapter": first[0].named_state(), "optimizer": named_state(first[1], first[0])})
    resumed = make(name, CASES[name], groups=groups)
    resumed[0].load(state["adapter"])
    load_named_state(resumed[1], resumed[0], state["optimizer"])
    assert_equal(saved(named_state(resumed[1], resumed[0])), state["optimizer"])
    train(*resumed, range(3, 6))
    assert_equal(resumed[0].named_state(), whole[0].named_state())
    assert_equal(named_state(resumed[1], resumed[0]), named_state(whole[1], whole[0]))


def test_a_flat_state_is_that_of_each_tensor():
    flat, single = make("adamw", {}), make("adamw", {})
    single = single[0], optim.make_optimizer("adamw", single[0].parameters(), 1e-2, {})
    for each in (flat, single):
        train(*each, range(3))
    of_flat, of_single = (named_state(optimizer, master_weights) for master_weights, optimizer in (flat, single))
    for name, shape in SHAPES.items():
        assert of_flat["tensors"][name]["exp_avg_sq"].shape == shape
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(of_flat["tensors"][name][key], of_single["tensors"][name][key])
    (rest,) = of_flat["flat"]
    assert rest["names"] == list(SHAPES) and list(rest["state"]) == ["step"] and of_single["flat"] is None


def test_8_bit_states_are_by_name_and_the_scales_of_their_blocks_are_not():
    master_weights, optimizer = make("bitsandbytes.optim.AdEMAMix8bit", {})
    train(master_weights, optimizer, range(2))
    state = named_state(optimizer, master_weights)
    codes = state["tensors"]["a.B"]["__bnb_optimizer_quant_state__"]
    assert {key: (value.dtype, tuple(value.shape)) for key, value in codes.items()} == {
        "state1": (torch.uint8, (2, 70, 4)),
        "state2": (torch.uint8, (70, 4)),
    }
    rest = state["flat"][0]["state"]["__bnb_optimizer_quant_state__"]
    assert rest["absmax1"].shape == (2, 23) and rest["absmax2"].shape == (23,)


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "torch.optim.Adafactor"])
def test_another_order_of_the_tensors_is_joined_by_name_or_refused(name):
    first, other = make(name, {}), make(name, {}, shapes=dict(reversed(SHAPES.items())))
    train(*first, range(3))
    other[0].load(first[0].named_state())
    state = saved(named_state(first[1], first[0]))
    if name == "adamw8bit":
        with pytest.raises(ForeignState, match="scales of blocks that cross tensors"):
            load_named_state(other[1], other[0], state)
        return
    load_named_state(other[1], other[0], state)
    for each in (first, other):
        train(*each, range(3, 6))
    weights = other[0].named_state()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in first[0].named_state().items())


def test_a_state_that_does_not_fit_is_refused():
    master_weights, optimizer = make("adamw", {})
    train(master_weights, optimizer, range(1))
    state = named_state(optimizer, master_weights)
    tensors = state["tensors"]
    short = tensors["a.A"] | {"exp_avg": torch.zeros(4, 100)}
    half = tensors["a.A"] | {"exp_avg": tensors["a.A"]["exp_avg"].half()}
    (group,) = state["groups"]
    cases = [
        ({}, "is not by name"),
        (optimizer.state_dict(), "is not by name"),
        (state | {"flat": None}, "is that of single tensors"),
        (state | {"groups": [group | {"names": ["a.A"]}]}, "has other tensors"),
        (state | {"groups": []}, "has other tensors"),
        (state | {"flat": [state["flat"][0] | {"names": ["a.A"]}]}, "has other tensors"),
        (state | {"tensors": {"a.A": tensors["a.A"]}}, "lacks a part of some tensors"),
        (state | {"tensors": tensors | {"a.A": {}}}, "lacks a part of some tensors"),
        (state | {"tensors": tensors | {"a.A": short}}, r"a part that is not of \[4, 130\]"),
        (state | {"tensors": tensors | {"a.A": half}}, r"a part that is not of \[70, 4\]"),
        ({"whole": {}, "names": []}, "has other tensors"),
    ]
    for wrong, reason in cases:
        with pytest.raises(ForeignState, match=reason):
            load_named_state(optimizer, master_weights, wrong)
            pytest.fail(reason)
    load_named_state(optimizer, master_weights, state)
    singles = optim.make_optimizer("adamw", master_weights.parameters(), 1e-2, {})
    with pytest.raises(ForeignState, match="is that of one flat tensor"):
        load_named_state(singles, master_weights, state)
