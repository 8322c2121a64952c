"""Checks, before anything is encoded, that an optimizer can train the adapter and resume exactly.

An optimizer may be any class by its import path. What it needs or breaks shows only in its steps, so a few are taken here, on
tensors of the adapter's shapes.
"""

from __future__ import annotations

import contextlib
import io
import math
import random
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import nn

from sushi_research.config.learning import OptimizerSection
from sushi_research.errors import UserError, first_line
from sushi_research.runs.checkpoint import assert_plain
from sushi_research.training import optim, optimizer_state
from sushi_research.training.master_weights import MasterWeights

# As many steps as needed to notice a counter of every fifth or sixth step (Lookahead, Ranger) that is not in the state.
STEPS = 6
# Some collect gradients for ten steps before they change a weight (AdaShift).
PATIENCE = 24
SAVED = 3
# 32 MiB per copy of the tensors, of which there are about ten.
MOST_NUMBERS = 2**23
# bitsandbytes keeps the state of a parameter with fewer numbers in fp32 instead of 8 bits, which is another kernel.
LEAST_NUMBERS = 4096


def require_usable(
    section: OptimizerSection,
    shapes: Mapping[str, Sequence[int]],
    rates: Sequence[float],
    device: torch.device,
) -> None:
    """Takes six steps with the optimizer, and takes the last three again from the saved state.

    `shapes` are those of the adapter's tensors by name; `rates` are the learning rates of the steps. The tensors start as an
    adapter does, and get random gradients of norm 1. The process-wide random generators are left as they were.

    Raises UserError for an optimizer that fails, replaces its tensors, makes weights that are not finite, has a state that a
    checkpoint cannot hold, takes other steps after a resume, or does not follow the learning rate of a schedule.
    """
    assert len(rates) == STEPS
    shapes, devices = _distinct(shapes), [device] if device.type == "cuda" else []
    try:
        # Some classes print their settings, which the real optimizer does once more.
        with _own_generators(devices), contextlib.redirect_stdout(io.StringIO()):
            _check(section, shapes, rates, device)
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # each library raises its own
        raise UserError(
            f"the optimizer {section.name} fails on tensors of the adapter's shapes ({first_line(error)}): choose another "
            "optimizer.name, or set the optimizer.kwargs that it needs."
        ) from error


def _check(
    section: OptimizerSection, shapes: Mapping[str, Sequence[int]], rates: Sequence[float], device: torch.device
) -> None:
    name = section.name
    _seed_generators(0)
    whole = _Trial(section, shapes, device)
    whole.steps(rates, range(SAVED))
    saved, before = whole.save(), whole.values()
    whole.steps(rates, range(SAVED, STEPS))
    expected = whole.values()
    if not expected.isfinite().all():
        raise UserError(
            f"the optimizer {name} makes weights that are not finite within {STEPS} steps at optimizer.lr {section.lr:g}: lower "
            "it, or choose another optimizer.name or other optimizer.kwargs."
        )

    _seed_generators(1)  # in a resumed run their state is another one
    resumed = _Trial(section, shapes, device)
    resumed.restore(saved)
    with optim.averaged_weights(resumed.optimizer, resumed.master_weights):
        pass
    resumed.steps(rates, range(SAVED, STEPS))
    if not torch.equal(resumed.values(), expected) and _repeats(section, shapes, rates, device, expected):
        evaluated = " and eval() and train() were called" if optim.averages_weights(whole.optimizer) else ""
        raise UserError(
            f"the optimizer {name} takes other steps after its state was saved and loaded{evaluated}, so a run could not be "
            "resumed: choose another optimizer.name or other optimizer.kwargs."
        )

    if not whole.learns():
        whole.steps([*rates, *[max(rates)] * (PATIENCE - STEPS)], range(STEPS, PATIENCE))
    if not whole.learns():
        raise UserError(
            f"the optimizer {name} leaves every second matrix of the adapter at zero in {PATIENCE} steps, as those do that scale a "
            "step by the weight's norm (LAMB, LARS), so nothing would be learned: choose another optimizer.name."
        )

    if len(set(rates)) == 1 or torch.equal(before, expected):
        return
    slower = _Trial(section, shapes, device)
    slower.restore(saved)
    slower.steps([rate / 2 for rate in rates], range(SAVED, STEPS))
    if torch.equal(slower.values(), expected):
        raise UserError(
            f"the optimizer {name} takes the same steps at half the learning rate, so the schedule has no effect: set "
            "schedule.name constant and schedule.warmup 0, or choose another optimizer.name."
        )


class _Trial:
    """An optimizer with tensors of the adapter's shapes."""

    def __init__(self, section: OptimizerSection, shapes: Mapping[str, Sequence[int]], device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        self._working = {}
        for name, shape in shapes.items():
            down = torch.randn(tuple(shape), generator=generator) / math.sqrt(math.prod(shape[1:]))
            self._working[name] = nn.Parameter((down if _is_down(name) else torch.zeros(tuple(shape))).to(device))
        self._name = section.name
        master_weights = MasterWeights(self._working, torch.float32)
        optimizer = optim.build_optimizer(section.name, master_weights, section.lr, section.kwargs)
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        is_flat = optim.is_elementwise(section.name, section.kwargs)
        trained = master_weights.flat_parameters() if is_flat else master_weights.parameters()
        if held != {id(parameter) for parameter in trained}:
            raise UserError(
                f"the optimizer {section.name} does not hold all tensors of the adapter: choose another one."
            )
        self.master_weights, self.optimizer = master_weights, optimizer

    def restore(self, saved: bytes) -> None:
        """Restores what `save` returned, as a checkpoint is loaded. An optimizer may go on in the tensors that it is given."""
        state = torch.load(io.BytesIO(saved), map_location="cpu", weights_only=True)
        self.master_weights.load(state["adapter"])
        optimizer_state.load_named_state(self.optimizer, self.master_weights, state["optimizer"])

    def save(self) -> bytes:
        """The state as a checkpoint stores it."""
        state = {
            "adapter": self.master_weights.named_state(),
            "optimizer": optimizer_state.named_state(self.optimizer, self.master_weights),
        }
        try:
            assert_plain(state["optimizer"], "its state")
        except AssertionError as error:
            raise UserError(
                f"the optimizer {self._name} keeps what a checkpoint cannot hold ({first_line(error)}): choose another "
                "optimizer.name."
            ) from error
        file = io.BytesIO()
        torch.save(state, file)
        return file.getvalue()

    def steps(self, rates: Sequence[float], steps: range) -> None:
        """Takes the steps of these numbers, from 0, as the training loop does."""
        master_weights, optimizer = self.master_weights, self.optimizer
        for step in steps:
            for parameter, gradient in zip(self._working.values(), self._gradients(step), strict=True):
                parameter.grad = gradient.to(parameter.device)
            master_weights.accumulate()
            optim.set_learning_rate(optimizer, rates[step])
            optimizer.step()
            if not master_weights.are_views():
                raise UserError(
                    f"the optimizer {self._name} replaces the tensors or gradients that it is given instead of changing them, "
                    "which is not supported: choose another optimizer.name."
                )
            if any(map(master_weights.holds_gradient, _tensors(list(optimizer.state.values())))):
                raise UserError(
                    f"the optimizer {self._name} keeps a gradient without copying it, and gradients are set to zero after each "
                    "step: choose another optimizer.name."
                )
            master_weights.refresh()
            master_weights.zero_grad()

    def learns(self) -> bool:
        """Whether a second matrix has left zero. Until then the adapter does nothing."""
        return any(tensor.any() for name, tensor in self.master_weights.named_state().items() if not _is_down(name))

    def values(self) -> torch.Tensor:
        """The weights, as one vector."""
        return torch.cat([tensor.reshape(-1) for tensor in self.master_weights.named_state().values()])

    def _gradients(self, step: int) -> list[torch.Tensor]:
        """Random gradients of norm 1 over all tensors. That of A is zero in the first step, because B is."""
        generator = torch.Generator().manual_seed(step)
        gradients = [torch.randn(parameter.shape, generator=generator) for parameter in self._working.values()]
        if step == 0:
            gradients = [g * (not _is_down(name)) for name, g in zip(self._working, gradients, strict=True)]
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
        return [gradient / norm for gradient in gradients]


def _repeats(
    section: OptimizerSection,
    shapes: Mapping[str, Sequence[int]],
    rates: Sequence[float],
    device: torch.device,
    expected: torch.Tensor,
) -> bool:
    """Whether the same steps give the same bits again. On a GPU, without train.deterministic, they may not."""
    _seed_generators(0)
    again = _Trial(section, shapes, device)
    again.steps(rates, range(STEPS))
    return torch.equal(again.values(), expected)


@contextlib.contextmanager
def _own_generators(devices: Sequence[torch.device]) -> Iterator[None]:
    """A block that leaves the random generators of torch (on the CPU and `devices`), numpy and Python as they were."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


def _seed_generators(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def _distinct(shapes: Mapping[str, Sequence[int]]) -> dict[str, Sequence[int]]:
    """One tensor of each shape: layers repeat, and an optimizer treats equal shapes equally. The smallest, if all are too many.

    More of a shape if together they have fewer than `LEAST_NUMBERS` numbers, because an elementwise optimizer gets them as one.
    """
    by_shape = {(_is_down(name), tuple(shape)): name for name, shape in reversed(shapes.items())}
    found, numbers = {}, 0
    for (_, shape), name in sorted(by_shape.items(), key=lambda item: math.prod(item[0][1])):
        numbers += math.prod(shape)
        if len(found) >= 2 and numbers > MOST_NUMBERS:
            break
        found[name] = shape
    for name, shape in shapes.items():
        if name not in found and sum(map(math.prod, found.values())) < LEAST_NUMBERS:
            found[name] = shape
    return found


def _is_down(name: str) -> bool:
    return ".lora_A." in name


def _tensors(nest: object) -> list[torch.Tensor]:
    if isinstance(nest, torch.Tensor):
        return [nest]
    items = nest.values() if isinstance(nest, dict) else nest if isinstance(nest, list | tuple) else ()
    return [tensor for item in items for tensor in _tensors(item)]
