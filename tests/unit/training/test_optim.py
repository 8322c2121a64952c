"""Optimizers by name and their state."""

import io

import pytest
import torch
from torch import nn

from sushi_research.errors import UserError
from sushi_research.training.optim import make_optimizer, set_learning_rate


def parameters():
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape)) for shape in ((64, 80), (16, 9, 3, 3), (64, 64), (64, 63))]


def train(optimizer, weights, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()


def test_names():
    import bitsandbytes

    assert type(make_optimizer("adamw8bit", parameters(), 1e-3, {})) is bitsandbytes.optim.AdamW8bit
    adamw = make_optimizer("adamw", parameters(), 1e-3, {})
    assert type(adamw) is torch.optim.AdamW and adamw.defaults["foreach"] is True
    assert type(make_optimizer("torch.optim.SGD", parameters(), 1e-3, {"momentum": 0.9})) is torch.optim.SGD
    assert type(make_optimizer("bitsandbytes.optim.Lion8bit", parameters(), 1e-3, {})) is bitsandbytes.optim.Lion8bit


def test_arguments_arrive():
    kwargs = {"betas": [0.8, 0.95], "weight_decay": 0.5, "foreach": False}
    optimizer = make_optimizer("adamw", parameters(), 2e-3, kwargs)
    assert optimizer.defaults["betas"] == (0.8, 0.95)
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (2e-3, 0.5)
    assert optimizer.defaults["foreach"] is False
    eight = make_optimizer("adamw8bit", parameters(), 2e-3, {"betas": [0.8, 0.95], "min_8bit_size": 10**6})
    assert eight.defaults["betas"] == (0.8, 0.95)
    assert eight.args.min_8bit_size == 10**6


class WithoutLr(torch.optim.Optimizer):
    def __init__(self, params):
        super().__init__(params, {})


MISTAKES = [
    (
        "adamw8bits",
        {},
        r"^adamw8bits is not an optimizer \(did you mean adamw8bit\?\): choose from adamw8bit, adamw,",
    ),
    ("torch.optim.AdamV", {}, r"^torch\.optim\.AdamV is no torch optimizer class \(did you mean Adam\w*\?\)"),
    (
        "torch.optimm.Adam",
        {},
        r"^the optimizer torch\.optimm\.Adam cannot be imported \(No module named 'torch.optimm'\)",
    ),
    ("torch.nn.Linear", {}, r"^torch\.nn\.Linear is no torch optimizer class"),
    ("math.sqrt", {}, r"^math\.sqrt is no torch optimizer class"),
    ("torch.optim.LBFGS", {}, r"^the step of the optimizer torch\.optim\.LBFGS needs arguments"),
    (f"{__name__}.WithoutLr", {}, r"^the optimizer [\w.]+\.WithoutLr takes no lr"),
    (
        "adamw",
        {"weight_decai": 0},
        r"^the optimizer adamw has no argument weight_decai \(did you mean weight_decay\?\): it takes betas",
    ),
    ("adamw", {"lr": 1.0}, r"has no argument lr"),
    ("adamw8bit", {"epsilon": 1e-8}, r"^the optimizer adamw8bit has no argument epsilon(?! \(did you mean params)"),
    ("adamw", {"eps": "1e-8"}, r"^the optimizer adamw refuses its arguments \("),
    ("adamw", {"betas": [2.0, 0.9]}, r"refuses its arguments \(Invalid beta parameter at index 0"),
    ("adamw8bit", {"amsgrad": True}, r"refuses its arguments \(AdamW8bit does not support amsgrad"),
]


def test_mistakes_are_named():
    for name, kwargs, sentence in MISTAKES:
        with pytest.raises(UserError, match=sentence):
            make_optimizer(name, parameters(), 1e-3, kwargs)
            pytest.fail(f"{name} with {kwargs} was accepted")


def test_small_tensors_keep_fp32_states():
    weights = parameters()
    optimizer = make_optimizer("adamw8bit", weights, 1e-3, {})
    train(optimizer, weights, range(1))
    dtypes = [{optimizer.state[weight][key].dtype for key in ("state1", "state2")} for weight in weights]
    # 5,120, 1,296, 4,096 and 4,032 numbers.
    assert dtypes == [{torch.uint8}, {torch.float32}, {torch.uint8}, {torch.float32}]


@pytest.mark.parametrize("name", ["adamw8bit", "adamw", "torch.optim.RMSprop"])
def test_the_state_resumes_bit_for_bit(name):
    whole_weights = parameters()
    whole = make_optimizer(name, whole_weights, 1e-3, {})
    train(whole, whole_weights, range(6))

    weights = parameters()
    first = make_optimizer(name, weights, 1e-3, {})
    train(first, weights, range(3))
    buffer = io.BytesIO()
    torch.save({"optimizer": first.state_dict(), "weights": weights}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)

    resumed_weights = [nn.Parameter(weight.detach().clone()) for weight in saved["weights"]]
    resumed = make_optimizer(name, resumed_weights, 5.0, {})
    resumed.load_state_dict(saved["optimizer"])
    assert resumed.param_groups[0]["lr"] == 1e-3
    for weight, earlier in zip(resumed_weights, weights, strict=True):
        for key, value in first.state[earlier].items():
            if isinstance(value, torch.Tensor):
                assert resumed.state[weight][key].dtype == value.dtype, key
                assert torch.equal(resumed.state[weight][key], value), key
            else:
                assert resumed.state[weight][key] == value, key
    train(resumed, resumed_weights, range(3, 6))
    assert all(torch.equal(one, other) for one, other in zip(resumed_weights, whole_weights, strict=True))


@pytest.mark.parametrize("name", ["adamw8bit", "adamw"])
def test_a_rate_that_is_set_is_the_rate_of_the_next_step(name):
    weights = parameters()
    optimizer = make_optimizer(name, weights, 1e-3, {})
    assert set_learning_rate(optimizer, 0.0) == 0.0
    train(optimizer, weights, range(1))
    assert all(torch.equal(weight, start) for weight, start in zip(weights, parameters(), strict=True))
    set_learning_rate(optimizer, 1e-3)
    train(optimizer, weights, range(1, 2))
    assert not any(torch.equal(weight, start) for weight, start in zip(weights, parameters(), strict=True))
