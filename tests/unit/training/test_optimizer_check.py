"""Optimizers by their import path: those that can train an adapter and resume exactly, and those that cannot."""

import contextlib
import math
import random
import re

import numpy as np
import pytest
import torch
from schedule_free import ScheduleFree
from torch import nn

from sushi_research.config.learning import OptimizerSection
from sushi_research.errors import UserError
from sushi_research.training.optimizer_check import STEPS, require_usable
from sushi_research.training.optimizer_trial import distinct
from sushi_research.training.parameter_groups import Group

CPU = torch.device("cpu")
MATRICES = {"a.lora_A.weight": (4, 12), "a.lora_B.weight": (8, 4)}
CONVOLUTION = {"b.lora_A.weight": (4, 8, 3, 3), "b.lora_B.weight": (8, 4, 1, 1)}


def check(name, *, lr=0.01, rates=None, shapes=MATRICES, **kwargs):
    rates = [lr * factor for factor in (0, 0.5, 1, 0.75, 0.5, 0.25)] if rates is None else rates
    require_usable(OptimizerSection(name=name, lr=lr, kwargs=kwargs), shapes, rates, CPU)


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "torch.optim.Muon", "bitsandbytes.optim.Lion8bit"])
def test_optimizers_that_can_be_used(name):
    before = torch.random.get_rng_state(), random.getstate(), str(np.random.get_state())
    check(name)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert (random.getstate(), str(np.random.get_state())) == before[1:]


def test_new_tokens_alone_start_at_no_zero():
    """Where the adapter is not trained, it stays at zero; a class that leaves a trained one there is refused still."""
    shapes = MATRICES | {"text_encoder.new_tokens.cat": (2, 8)}
    rates = [0.01 * factor for factor in (0, 0.5, 1, 0.75, 0.5, 0.25)]
    for name, until, labels in (("adamw", 0, ()), ("bitsandbytes.optim.LAMB", None, ("leaves every second matrix",))):
        groups = [
            Group(tuple(MATRICES), 0.0 if until == 0 else 1.0, "unet", "unet", until),
            Group(("text_encoder.new_tokens.cat",), 3.0, "text_encoder", "new_tokens"),
        ]
        with contextlib.ExitStack() as refused:
            for label in labels:
                refused.enter_context(pytest.raises(UserError, match=label))
            require_usable(OptimizerSection(name=name, lr=0.01), shapes, rates, CPU, groups)


class Loud(torch.optim.SGD):
    def __init__(self, params, lr):
        print("loud")
        super().__init__(params, lr=lr)


def test_optimizers_that_average_print_or_wait_can_be_used(capsys):
    check("schedule_free.ScheduleFree")
    check(f"{__name__}.Loud")
    check(f"{__name__}.Waits")
    assert capsys.readouterr().out == ""


class Waits(torch.optim.SGD):
    """Changes no weight in its first ten steps, as AdaShift does."""

    def step(self, closure=None):
        (group,) = self.param_groups
        group["count"] = group.get("count", 0) + 1
        if group["count"] > 10:
            super().step(closure)


class ForgetsItsCount(torch.optim.SGD):
    """Does something else in every fifth step, and its count is not in its state."""

    count = 0

    def step(self, closure=None):
        self.count += 1
        for group in self.param_groups:
            group["lr"] *= 2 if self.count % 5 == 0 else 1
        super().step(closure)


class Noisy(torch.optim.SGD):
    """Draws from a generator of the process, whose state is not saved."""

    def __init__(self, params, lr, draw):
        super().__init__(params, lr=lr)
        self.draw = {"torch": lambda: torch.rand(1).item(), "numpy": np.random.random, "python": random.random}[draw]

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            parameter.add_(self.draw(), alpha=self.param_groups[0]["lr"])


class LosesTheMode(ScheduleFree):
    """Its `eval()` changes a state that `train()` does not change back."""

    def eval(self):
        super().eval()
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter].get("z", torch.zeros(1)).zero_()


class Swaps(torch.optim.SGD):
    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            parameter.data = parameter.data - parameter.grad


class DropsGradients(torch.optim.SGD):
    def step(self, closure=None):
        super().step(closure)
        self.zero_grad()


class KeepsGradients(torch.optim.SGD):
    def step(self, closure=None):
        super().step(closure)
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["before"] = parameter.grad


class KeepsFunctions(torch.optim.SGD):
    def step(self, closure=None):
        super().step(closure)
        self.state[self.param_groups[0]["params"][0]]["how"] = max


class Divides(torch.optim.SGD):
    """The gradient of A is zero in the first step, because B is."""

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            parameter.sub_(parameter.grad / parameter.grad.norm(), alpha=self.param_groups[0]["lr"])


class LeavesOut(torch.optim.SGD):
    def __init__(self, params, lr):
        super().__init__(list(params)[:1], lr=lr)


class NeedsAModel(torch.optim.SGD):
    def __init__(self, model, lr):
        super().__init__(model.parameters(), lr=lr)


class NeedsKeyword(torch.optim.SGD):
    def step(self, *, closure):
        pass


class NeedsClosure(torch.optim.SGD):
    def step(self, closure=None):
        closure()


class NeedsTheGraph(torch.optim.SGD):
    def step(self, closure=None):
        torch.autograd.grad(self.param_groups[0]["params"][0].grad.sum(), self.param_groups[0]["params"][0])


class OneRate(torch.optim.SGD):
    """Takes the rate of its first group for all."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["lr"] = self.param_groups[0]["lr"]
        super().step(closure)


def test_a_group_that_is_too_slow_to_change_says_nothing_of_its_rate():
    """At 1e-12 the vectors of new tokens stay as they are in fp32, at half the rate too."""
    shapes = MATRICES | {"text_encoder.new_tokens.cat": (2, 8)}
    groups = [
        Group(tuple(MATRICES), 1.0, "unet", "unet"),
        Group(("text_encoder.new_tokens.cat",), 3.0, "text_encoder", "new_tokens"),
    ]
    for lr in (1e-12, 0.01):
        rates = [lr * 2.0 ** (step - STEPS) for step in range(STEPS)]  # as a range test's
        for name in ("adamw", "torch.optim.SGD"):
            require_usable(OptimizerSection(name=name, lr=lr), shapes, rates, CPU, groups)
    with pytest.raises(UserError, match=r"cannot train unet and new_tokens .* does not follow the .* of new_tokens"):
        require_usable(OptimizerSection(name=f"{__name__}.OneRate", lr=0.01), shapes, [0.01] * STEPS, CPU, groups)


REFUSED = [
    ("torch.optim.SparseAdam", {}, "fails on tensors of the adapter's shapes (SparseAdam does not support dense gradients"),
    ("torch.optim.Muon", {"shapes": CONVOLUTION}, "refuses its arguments (Muon only supports 2D parameters"),
    ("torch.optim.Rprop", {}, "takes the same steps at half the learning rate, so the schedule has no effect: set schedule"),
    ("bitsandbytes.optim.LAMB", {}, "leaves every second matrix of the adapter at zero in 24 steps"),
    ("adamw", {"eps": 0.0}, "makes weights that are not finite"),
    ("adamw", {"betas": [0.9]}, "refuses its arguments (tuple index out of range)"),
    ("adamw", {"differentiable": True}, "fails on tensors of the adapter's shapes"),
    ("ForgetsItsCount", {}, "takes other steps after its state was saved and loaded, so a run could not be resumed"),
    ("Noisy", {"draw": "torch"}, "draws from the random generator of torch in its steps, which a checkpoint does not hold, so"),
    ("Noisy", {"draw": "numpy"}, "draws from the random generator of numpy in its steps, which a checkpoint does not hold, so"),
    ("Noisy", {"draw": "python"}, "draws from the random generator of Python in its steps, which a checkpoint does not hold, so"),
    ("pytorch_optimizer.DASH", {}, "draws from the random generator of torch in its steps"),  # in the first and each tenth
    ("LosesTheMode", {}, "its state was saved and loaded and eval() and train() were called, so a run could not be resumed"),
    ("Swaps", {}, "replaces the tensors or gradients"),
    ("DropsGradients", {}, "replaces the tensors or gradients"),
    ("KeepsGradients", {}, "keeps a gradient without copying it"),
    ("KeepsFunctions", {}, "keeps what a checkpoint cannot hold (its state['tensors']['a.lora_B.weight']['how'] is a"),
    ("Divides", {}, f"makes weights that are not finite within {STEPS} steps at optimizer.lr 0.01: lower it"),
    ("LeavesOut", {}, "does not hold all tensors of the adapter"),
    ("NeedsAModel", {}, "refuses its arguments ('list' object has no attribute 'parameters')"),
    ("NeedsKeyword", {}, "needs arguments (as LBFGS does)"),
    ("NeedsClosure", {}, "fails on tensors of the adapter's shapes ('NoneType' object is not callable)"),
    ("NeedsTheGraph", {}, "fails on tensors of the adapter's shapes (element 0 of tensors does not require grad"),
]  # fmt: skip


def test_optimizers_that_cannot_be_used_are_named():
    for name, options, sentence in REFUSED:
        name = name if name.islower() or "." in name else f"{__name__}.{name}"
        with pytest.raises(UserError, match=re.escape(sentence)) as caught:
            check(name, **options)
            pytest.fail(f"{name} was accepted")
        assert name in str(caught.value) and "\n" not in str(caught.value)


def test_a_constant_rate_needs_no_optimizer_that_follows_it():
    check("torch.optim.Rprop", rates=[0.01] * STEPS)


def test_a_module_that_cannot_be_imported_is_named(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "ends_python.py").write_text("import sys\nsys.exit(0)\n")
    (tmp_path / "broken.py").write_text("class Half(:\n")
    for module in ("ends_python", "broken"):
        with pytest.raises(UserError, match=f"the optimizer {module}.Half cannot be imported"):
            check(f"{module}.Half")


def test_one_tensor_of_each_shape_and_the_smallest_where_all_are_too_many():
    shapes = {
        f"{layer}.lora_{side}.weight": shape for layer in "abc" for side, shape in {"A": (4, 12), "B": (8, 4)}.items()
    }
    larger = {"c.lora_A.weight": (64, 64), "c.lora_B.weight": (32, 64)}
    one_each = {"a.lora_B.weight": (8, 4), "a.lora_A.weight": (4, 12)} | larger
    assert distinct(shapes | larger | {"d.lora_A.weight": (64, 64)}) == one_each
    assert distinct(one_each | {"e.lora_A.weight": (4096, 4096), "e.lora_B.weight": (4096, 4096)}) == one_each
    assert distinct({"d.lora_B.weight": (4096, 4096)}) == {"d.lora_B.weight": (4096, 4096)}


def test_as_many_tensors_are_tried_as_8_bit_states_need():
    """bitsandbytes keeps fewer than 4,096 numbers in fp32: one tensor of each shape may be fewer where all are more."""
    shapes = {f"{layer}.lora_{side}.weight": (8, 16) for layer in range(100) for side in "AB"}
    tried = distinct(shapes)
    assert sum(math.prod(shape) for shape in tried.values()) == 4096
    assert len(distinct({name: shapes[name] for name in list(shapes)[:20]})) == 20
    groups = [Group(tuple(name for name in shapes if side in name), 1.0, "unet", side) for side in ("_A", "_B")]
    tried = distinct(shapes, groups)
    assert {sum(math.prod(tried[name]) for name in group.names if name in tried) for group in groups} == {4096}


def test_an_optimizer_is_tried_as_it_trains():
    """A starts random and B at zero; the gradients have norm 1 together."""
    seen = []

    class Recorder(torch.optim.SGD):
        def step(self, closure=None):
            (group,) = self.param_groups
            seen.append([(parameter.detach().clone(), parameter.grad.clone()) for parameter in group["params"]])
            super().step(closure)

    globals()["Recorder"] = Recorder
    check(f"{__name__}.Recorder")
    (b, b_gradient), (a, a_gradient) = seen[0]
    assert a.any() and not b.any() and not a_gradient.any() and b_gradient.any()
    for step in seen:
        assert nn.utils.get_total_norm([gradient for _, gradient in step]).item() == pytest.approx(1)
