"""What every optimizer with a name must do: train, resume bit for bit, and show its result.

With gradients that overflow, a clip, and parameter groups of their own.
"""

import copy
import io
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sushi_research.config.learning import OPTIMIZER_NAMES, OptimizerSection, ScheduleSection
from sushi_research.errors import UserError
from sushi_research.planning import memory
from sushi_research.precision import dtype_policy, make_scaler
from sushi_research.training import optim, optimizer_classes, optimizer_plan, optimizer_state
from sushi_research.training.master_weights import MasterWeights
from sushi_research.training.optimizer_check import STEPS, require_usable
from sushi_research.training.parameter_groups import Group
from sushi_research.training.state import TrainState

CPU = torch.device("cpu")
# A layer, a convolution, the magnitudes of a DoRA, and the vectors of a new token in two encoders. Large enough for 8-bit states.
SHAPES = {
    "a.lora_A.weight": (8, 320),
    "a.lora_B.weight": (320, 8),
    "b.lora_A.weight": (8, 64, 3, 3),
    "b.lora_B.weight": (64, 8, 1, 1),
    "b.magnitude": (1, 64, 1, 1),
    "text_encoder.a.lora_A.weight": (8, 512),
    "text_encoder.a.lora_B.weight": (512, 8),
    "text_encoder.new_tokens.<cat>": (2, 64),
}
# A rate that a run would have, and the part of the distance to the targets that is left after it, which differs.
LR = {"prodigy": 1.0}
RUN = 12


def groups_of(factor=0.5):
    names = {prefix: tuple(name for name in SHAPES if name.startswith("text") == prefix) for prefix in (False, True)}
    return [Group(names[False], 1.0, "unet", "unet"), Group(names[True], factor, "text_encoder", "text_encoder")]


class Run:
    """The loop of a training script around a loss that is the squared distance of each tensor to a target."""

    def __init__(self, name, groups=(), kwargs=None):
        generator = torch.Generator().manual_seed(0)
        self.working = {}
        for key, shape in SHAPES.items():
            start = (
                torch.zeros(shape)
                if key.endswith(("B.weight", "magnitude"))
                else torch.randn(shape, generator=generator)
            )
            self.working[key] = nn.Parameter(0.02 * start)
        self.targets = {key: 0.02 * torch.randn(shape, generator=generator) for key, shape in SHAPES.items()}
        names = [group.names for group in groups] or None
        master_weights = MasterWeights(self.working, torch.float32, names)
        lr = LR.get(name, 1e-3)
        arguments = {"d0": 1e-4} if name == "prodigy" else {}
        optimizer = optim.build_optimizer(name, master_weights, lr, arguments | (kwargs or {}))
        self.lr, self.groups = lr, groups
        self.state = TrainState(master_weights, optimizer, make_scaler("fp16", CPU), groups)

    def loss(self):
        return sum((tensor - self.targets[key]).square().sum() for key, tensor in self.working.items())

    def steps(self, steps, overflow=3, shown=()):
        """Takes these steps; gradients are not finite in one, and the result is shown (evaluated, sampled) after some."""
        state, weights = self.state, self.state.master_weights
        for step in steps:
            state.scaler.scale(self.loss()).backward()
            if step == overflow:
                next(iter(self.working.values())).grad[0] = torch.inf
            weights.accumulate()
            optim.set_learning_rate(state.optimizer, self.lr * (1 - step / (2 * RUN)), self.groups, step)
            state.scaler.unscale_(state.optimizer)
            nn.utils.clip_grad_norm_(weights.flat_parameters(), 0.1)
            before = weights.named_state()
            state.step_optimizer(step + 1, RUN)
            assert equal(before, weights.named_state()) == (step == overflow)
            weights.refresh()
            weights.zero_grad()
            assert weights.are_views()
            if step in shown:
                with state.averaged_weights():
                    self.shown = weights.named_state()

    def saved(self):
        """The state as a checkpoint holds it, by name, read back from a file."""
        weights = self.state.master_weights
        file = io.BytesIO()
        torch.save(
            {
                "adapter": weights.named_state(),
                "optimizer": optimizer_state.named_state(self.state.optimizer, weights),
                "scaler": self.state.scaler.state_dict(),
                "skipped_steps": self.state.skipped_steps,
            },
            file,
        )
        file.seek(0)
        return torch.load(file, weights_only=True)


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("name", OPTIMIZER_NAMES)
def test_it_trains_and_resumes_bit_for_bit(name):
    groups = groups_of(1.0 if name == "prodigy" else 0.5)  # prodigy takes only one rate
    whole = Run(name, groups)
    start = whole.loss().item()
    whole.steps(range(RUN))
    with whole.state.averaged_weights():
        assert whole.loss().item() < 0.97 * start

    half = Run(name, groups)
    half.steps(range(7), shown=(1, 4, 6))  # within, before and after what is shown
    saved = half.saved()
    assert equal(saved["adapter"], half.state.master_weights.named_state())
    assert saved["optimizer"]["tensors"].keys() == SHAPES.keys(), "the state is by the names of the tensors"
    assert equal(half.shown, saved["adapter"]) != optim.averages_weights(half.state.optimizer)
    resumed = Run(name, groups)
    resumed.state.load(SimpleNamespace(load=lambda: copy.deepcopy(saved), foreign=UserError))
    resumed.steps(range(7, RUN), shown=(8,))
    assert equal(resumed.state.master_weights.named_state(), whole.state.master_weights.named_state())
    assert resumed.state.metrics() == whole.state.metrics()


@pytest.mark.parametrize("name", OPTIMIZER_NAMES)
def test_the_check_before_a_run_accepts_it_and_its_plan_knows_its_state(name):
    section = OptimizerSection(name=name, lr=LR.get(name, 1e-3))
    rates = [section.lr * factor for factor in (0, 0.5, 1, 0.75, 0.5, 0.25)]
    assert len(rates) == STEPS
    require_usable(section, SHAPES, rates, CPU, groups_of(1.0 if name == "prodigy" else 0.5))

    run = Run(name)
    run.steps(range(2), overflow=None)
    states = run.state.optimizer.state.values()
    numbers = sum(tensor.numel() for tensor in run.working.values())
    kept = sum(tensor.nbytes for state in states for tensor in optimizer_plan._tensors(state))
    tables = {"adamw8bit": 2048, "lion8bit": 1024}.get(name, 0)  # of 8-bit codes, the same for all tensors
    planned = optimizer_plan.plan_of(section, ScheduleSection(), SHAPES)
    assert planned.state_bytes == pytest.approx(kept - tables, abs=64), name
    assert planned.bytes_per_number == planned.state_bytes / numbers and planned.notes == ()
    assert planned.joined == (len(run.state.optimizer.param_groups[0]["params"]) == 1)
    dtypes = dtype_policy("bf16", optimizer=name, optimizer_kwargs={}, numbers=[numbers], vae=torch.float32)
    assert dtypes.optimizer_state == ("uint8" if name.endswith("8bit") else "float32")


ARGUMENTS = [
    ("prodigy", {"use_bias_correction": True}),  # joined, so that it keeps a copy of the zeros too
    ("prodigy", {"slice_p": 11}),
    ("prodigy", {"betas": [0.0, 0.99]}),
    ("adafactor", {"beta1": 0.9}),
    ("adamw", {"amsgrad": True}),
    ("came", {"ams_bound": True}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "kwargs"), ARGUMENTS, ids=str)
def test_the_plan_knows_the_state_with_arguments_too(name, kwargs):
    run = Run(name, kwargs=kwargs)
    run.steps(range(2), overflow=None)
    kept = sum(tensor.nbytes for each in run.state.optimizer.state.values() for tensor in optimizer_plan._tensors(each))
    numbers = sum(tensor.numel() for tensor in run.working.values())
    planned = optimizer_plan.state_bytes(OptimizerSection(name=name, kwargs=kwargs), SHAPES)
    assert planned == pytest.approx(kept, abs=64)
    assert memory.LEAST_WITH_ARGUMENTS.get(name, 0) * numbers <= kept


def test_state_in_lists_counts():
    """SOAP's preconditioners: two matrices for each side of the tensor, besides two averages."""
    section = OptimizerSection(name="pytorch_optimizer.SOAP")
    planned = optimizer_plan.state_bytes(section, {"a.lora_A.weight": (8, 64)})
    assert planned == 4 * (2 * 8 * 64 + 2 * 8**2 + 2 * 64**2)


def test_muon_orthogonalizes_matrices_and_trains_the_rest_by_adamw():
    run = Run("muon", groups_of())
    kinds = [(group["use_muon"], len(group["params"])) for group in run.state.optimizer.param_groups]
    assert kinds == [(True, 4), (False, 1), (True, 2), (False, 1)]
    before = run.state.master_weights.named_state()
    run.steps(range(1), overflow=None)
    for name, after in run.state.master_weights.named_state().items():
        change = (after - before[name]).flatten(1)
        rate = run.lr * (0.5 if name.startswith("text") else 1)
        if "lora" in name:  # all singular values are about 1, times 0.2 sqrt(larger side) and the rate
            values = torch.linalg.svdvals(change) / (rate * 0.2 * max(change.shape) ** 0.5)
            assert values.min() > 0.6 and values.max() < 1.3, (name, values)
        else:  # the first step of Adam has the size of the rate in each number
            torch.testing.assert_close(change.abs(), torch.full_like(change, rate), rtol=1e-3, atol=0)
    assert run.state.metrics() | {"skipped_steps": 0} == {"skipped_steps": 0, "lr/unet": 1e-3, "lr/text_encoder": 5e-4}


MISTAKES = [
    ("came", {"weight_decy": 0.1}, r"^the optimizer came has no argument weight_decy \(did you mean weight_decay\?\)"),
    ("muon", {"adamw_lr": 0.1}, r"^optimizer.kwargs.adamw_lr has no effect on the optimizer muon: set optimizer.lr, which"),
    ("pytorch_optimizer.Muon", {}, r"^the optimizer pytorch_optimizer.Muon refuses its .*: set optimizer.name muon, which gives"),
    ("adafactor", {"relative_step": True}, r"^the optimizer adafactor refuses its arguments \(Cannot combine manual"),
]  # fmt: skip


def test_mistakes_are_named():
    for name, kwargs, sentence in MISTAKES:
        with pytest.raises(UserError, match=sentence):
            Run(name, kwargs=kwargs)
            pytest.fail(f"{name} with {kwargs} was accepted")


@pytest.mark.parametrize("name", ["prodigy", "muon", "adamw_schedulefree", "prodigyopt.Prodigy"])
def test_a_missing_library_is_named_with_the_command(name, monkeypatch):
    monkeypatch.setattr(optimizer_classes.importlib.util, "find_spec", lambda package: None)
    with pytest.raises(
        UserError, match=rf"^the optimizer {name} is in the package \w+, which is not installed: .*optimizers"
    ):
        optimizer_classes.optimizer_class(name)


def test_settings_that_rarely_fit_are_in_the_plan():
    def notes(schedule="constant", **section):
        return optimizer_plan.plan_of(OptimizerSection(**section), ScheduleSection(name=schedule), SHAPES).notes

    (note,) = notes(name="prodigy", lr=1e-4)
    assert "1 is usual, and 0.0001 makes the steps 10,000 times smaller" in note
    assert notes(name="prodigyopt.Prodigy", lr=1e-4) == (note,) and notes(name="prodigy", lr=1.0) == ()
    assert "optimizer.lr 1 is about how far each step moves" in notes(name="lion", lr=1.0)[0]
    assert "schedule.name is cosine" in notes(name="adamw_schedulefree", lr=1e-3, schedule="cosine")[0]
    assert notes(name="torch.optim.SGD", lr=1.0) == notes(name="adamw", lr=1e-4, schedule="cosine") == ()
