"""Parameter groups: which tensors have which learning rate, and that steps, logs, checkpoints and checks follow it."""

import io

import pytest
import torch
from script_runs import CONFIGS, assert_equal
from torch import nn

from sushi_research.config.learning import OptimizerSection
from sushi_research.config.lora import LoraSection
from sushi_research.errors import UserError
from sushi_research.precision import make_scaler
from sushi_research.training import optim, optimizer_state
from sushi_research.training.master_weights import MasterWeights
from sushi_research.training.optimizer_check import STEPS, require_usable
from sushi_research.training.parameter_groups import Group, Own, Rates, groups_of, require_trained
from sushi_research.training.state import TrainState

CPU = torch.device("cpu")
UNET = ["a.lora_A.weight", "a.lora_B.weight", "b.lora_A.weight", "b.lora_B.weight"]
TEXT = ["text_encoder.c.lora_A.weight", "text_encoder.c.lora_B.weight"]
SHAPES = {name: (16, 320) if ".lora_A." in name else (300, 16) for name in UNET + TEXT}
PLUS = [
    Group((UNET[0], UNET[2]), 1.0, "unet", "unet"),
    Group((UNET[1], UNET[3]), 4.0, "unet", "unet_up"),
    Group(tuple(TEXT), 0.5, "text_encoder", "text_encoder", until=4),
]


def config(**optimizer):
    return CONFIGS["sd15"](
        model={"base": "x"}, data={"path": "x"}, train={"steps": 1}, optimizer={"lr": 2e-4} | optimizer
    )


def test_a_run_without_such_settings_has_one_group_in_the_order_of_the_tensors():
    (group,) = groups_of(UNET, config())
    assert (group.names, group.lr_factor, group.component, group.until) == (tuple(UNET), 1.0, "unet", None)
    assert Rates(2e-4, (group,)).describe() == []


def test_factors_are_those_of_component_and_matrix():
    own = {"text_encoder": Own(lr=5e-5, until=3)}
    found = groups_of(UNET + TEXT, config(lora_plus_ratio=16), own)
    assert [(group.label, group.lr_factor) for group in found] == [
        ("unet", 1.0),
        ("unet_up", 16.0),
        ("text_encoder", 0.25),
        ("text_encoder_up", 4.0),
    ]
    assert [group.names for group in found][:2] == [(UNET[0], UNET[2]), (UNET[1], UNET[3])]
    assert [found[2].rate(1.0, step) for step in (2, 3)] == [0.25, 0.0]
    (line,) = Rates(2e-4, tuple(found)).describe()
    assert line.startswith(
        "rates        unet 0.0002, unet_up 0.0032, text_encoder 5e-05 for 3 steps, text_encoder_up 0.0008"
    )


def test_the_last_override_that_has_a_factor_counts():
    overrides = [
        {"modules": "*", "lr_factor": 7.0},
        {"modules": "a", "lr_factor": 0.5},
        {"modules": "a", "rank": 8},
        {"modules": "b", "lr_factor": 0},
        {"modules": "text_encoder*", "lr_factor": 3.0},  # `*` alone is about the UNet
    ]
    made = config(lora_plus_ratio=2)
    made = made.model_copy(update={"lora": LoraSection(overrides=overrides)})
    found = {group.label: group for group in groups_of(UNET + TEXT, made)}
    factors = {"unet_x0.5": 0.5, "unet_x0.5_up": 1.0, "unet_x0": 0, "unet_x0_up": 0, "text_encoder_x3": 3.0}
    assert {label: group.lr_factor for label, group in found.items()} == factors | {"text_encoder_x3_up": 6.0}
    assert found["unet_x0.5_up"].names == (UNET[1],) and found["unet_x0"].names == (UNET[2],)
    close = {"overrides": [{"modules": "a", "lr_factor": 1.2345671}, {"modules": "b", "lr_factor": 1.2345672}]}
    assert len(groups_of(UNET, made.model_copy(update={"lora": LoraSection(**close)}))) == 4, (
        "two factors share a group"
    )
    assert [found[label].has_ended(0) for label in found] == [False, False, True, True, False, False]

    require_trained(list(found.values()), made, 10)
    with pytest.raises(UserError, match="so nothing would be trained: give some of them another lr_factor"):
        require_trained([found["unet_x0"], found["unet_x0_up"]], made, 10)
    with pytest.raises(UserError, match="so nothing would be trained from step 4 on: give"):
        require_trained([found["unet_x0"], PLUS[2]], made, 10)
    require_trained([found["unet_x0"], PLUS[2]], made, 4)


def test_lora_plus_needs_pairs_of_matrices():
    names = ["a.hada_w1_a", "a.hada_w1_b", "a.hada_w2_a", "a.hada_w2_b"]
    for ratio in (1.0, 16.0):
        made = CONFIGS["sd15"](
            model={"base": "x"},
            data={"path": "x"},
            train={"steps": 1},
            lora={"kind": "loha"},
            optimizer={"lora_plus_ratio": ratio},
        )
        (group,) = groups_of(names, made)
        if ratio == 1:
            require_trained([group], made, 1)
            continue
        with pytest.raises(
            UserError, match="^optimizer.lora_plus_ratio has no effect, because a module of kind loha is no pair"
        ):
            require_trained([group], made, 1)


def make(name, kwargs=None, groups=PLUS):
    generator = torch.Generator().manual_seed(0)
    working = {
        each: nn.Parameter(torch.randn(shape, generator=generator) * (".lora_A." in each))
        for each, shape in SHAPES.items()
    }
    master_weights = MasterWeights(working, torch.float32, [group.names for group in groups])
    optimizer = optim.build_optimizer(name, master_weights, 1e-2, kwargs or {})
    return TrainState(master_weights, optimizer, make_scaler("fp32", CPU), groups), working


def train(made, steps, rate=lambda step: 1e-2 / (step + 1)):
    state, working = made
    for step in steps:
        state.freeze_ended(step)
        generator = torch.Generator().manual_seed(step)
        for parameter in working.values():
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = gradient if parameter.requires_grad else None
        state.master_weights.accumulate()
        optim.set_learning_rate(state.optimizer, rate(step), state.groups, step)
        state.step_optimizer(step + 1, 100)
        state.master_weights.refresh()
        state.master_weights.zero_grad()


def test_lora_plus_is_what_kohya_trains():
    """AdamW of torch on single tensors, each at the rate that sd-scripts gives it (networks/lora.py, prepare_optimizer_params):
    unet_lr or text_encoder_lr, and loraplus_lr_ratio times that for lora_up. In fp32, by other kernels."""
    unet_lr, text_encoder_lr, ratio = 2e-4, 5e-5, 16.0
    groups = groups_of(UNET + TEXT, config(lr=unet_lr, lora_plus_ratio=ratio), {"text_encoder": Own(text_encoder_lr)})
    made, (_, theirs) = make("adamw", groups=groups), make("adamw", groups=groups)
    train(made, range(5), lambda step: unet_lr / (step + 1))

    theirs = {name: nn.Parameter(tensor.detach().clone()) for name, tensor in theirs.items()}
    rates = {name: text_encoder_lr if name.startswith("text") else unet_lr for name in theirs}
    rates = {name: rate * ratio if "lora_B" in name else rate for name, rate in rates.items()}
    optimizer = torch.optim.AdamW([{"params": [theirs[name]], "lr": rate} for name, rate in rates.items()])
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        for parameter in theirs.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        for group, rate in zip(optimizer.param_groups, rates.values(), strict=True):
            group["lr"] = rate / (step + 1)
        optimizer.step()
    for name, tensor in made[0].master_weights.named_state().items():
        torch.testing.assert_close(tensor, theirs[name].detach(), rtol=1e-6, atol=1e-9)


def test_rates_are_logged_by_group_where_they_differ():
    state, _ = made = make("adamw")
    train(made, range(1), lambda step: 1e-3)
    assert state.metrics() == {"lr/unet": 1e-3, "lr/unet_up": 4e-3, "lr/text_encoder": 5e-4}
    state.optimizer.param_groups[0]["d"] = 2.0
    assert state.metrics()["lr/unet_up"] == 8e-3
    even = [Group(tuple(UNET), 1.0, "unet", "unet"), Group(tuple(TEXT), 1.0, "text_encoder", "text_encoder")]
    assert make("adamw", groups=even)[0].metrics() == {}


OPTIMIZERS = ["adamw", "adamw8bit", "torch.optim.Adafactor", "schedule_free.ScheduleFree", f"{__name__}.MovesAtZero"]


class MovesAtZero(torch.optim.SGD):
    """Moves a group without a learning rate too, as Prodigy does, whose step has the largest rate of all groups."""

    @torch.no_grad()
    def step(self, closure=None):
        rate = max(group["lr"] for group in self.param_groups)
        for group in self.param_groups:
            for parameter in group["params"]:
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                momentum.mul_(0.9).add_(parameter.grad, alpha=group["lr"])
                parameter.sub_(momentum, alpha=rate)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_groups_resume_bit_for_bit_and_stay_as_they_are_after_their_last_step(name):
    whole, half = make(name), make(name)
    train(whole, range(4))
    ended = {each: whole[0].master_weights.named_state()[each] for each in TEXT}
    train(whole, range(4, 8))
    assert_equal({each: whole[0].master_weights.named_state()[each] for each in TEXT}, ended)
    assert all(parameter.requires_grad == (each in UNET) for each, parameter in whole[1].items())

    for stop in (2, 5):  # before and after the last step of a group
        half = make(name)
        train(half, range(stop))
        file = io.BytesIO()
        weights = half[0].master_weights
        torch.save([weights.named_state(), optimizer_state.named_state(half[0].optimizer, weights)], file)
        file.seek(0)
        adapter, optimizer = torch.load(file, weights_only=True)
        resumed = make(name)
        resumed[0].master_weights.load(adapter)
        optimizer_state.load_named_state(resumed[0].optimizer, resumed[0].master_weights, optimizer)
        train(resumed, range(stop, 8))
        assert_equal(resumed[0].master_weights.named_state(), whole[0].master_weights.named_state())


class OneRate(torch.optim.SGD):
    """Refuses several rates, as Prodigy and D-Adaptation do, except for zero."""

    def step(self, closure=None):
        if len({group["lr"] for group in self.param_groups} - {0.0}) > 1:
            raise RuntimeError("Setting different lr values is not supported")
        super().step(closure)


class FirstRate(torch.optim.SGD):
    """Uses the rate of the first group for all."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["lr"] = self.param_groups[0]["lr"]
        super().step(closure)


class OnlyTensors(torch.optim.SGD):
    def __init__(self, params, lr):
        super().__init__([parameter.requires_grad_() for parameter in params], lr=lr)


REFUSED = {
    "OneRate": "Setting different lr values is not supported",
    "FirstRate": "it does not follow the learning rate of unet_up",
    "OnlyTensors": "'dict' object has no attribute 'requires_grad_'",
}


def check(name, groups):
    rates = [0.01 * factor for factor in (0, 0.5, 1, 0.75, 0.5, 0.25)]
    assert len(rates) == STEPS
    require_usable(OptimizerSection(name=name, lr=0.01), SHAPES, rates, CPU, groups)


def test_optimizers_that_refuse_groups_are_named_before_the_training():
    for name, sentence in REFUSED.items():
        check(f"{__name__}.{name}", PLUS[:1])
        with pytest.raises(UserError) as caught:
            check(f"{__name__}.{name}", PLUS)
        assert str(caught.value) == (
            f"the optimizer {__name__}.{name} cannot train unet and unet_up and text_encoder as parameter groups of their own "
            f"({sentence}), but all tensors in one: choose another optimizer.name, or give all the same learning rate to the "
            "end of the run."
        )
    for name in (*OPTIMIZERS[:4], "torch.optim.ASGD"):  # ASGD follows a new rate one step later
        check(name, PLUS)
    # An end step alone is no other rate.
    check(f"{__name__}.OneRate", [Group(tuple(UNET), 1.0, "unet", "unet"), Group(tuple(TEXT), 1.0, "t", "t", until=2)])


def test_an_optimizer_that_cannot_be_used_at_all_is_refused_for_that():
    with pytest.raises(UserError, match="^the optimizer bitsandbytes.optim.LAMB leaves every second matrix"):
        check("bitsandbytes.optim.LAMB", PLUS)
