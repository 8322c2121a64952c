"""Checks, before anything is encoded, that an optimizer can train the adapter and resume exactly.

An optimizer may be any class by its import path. What it needs or breaks shows only in its steps, so a few are taken here, on
tensors of the adapter's shapes.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from sushi_research.config.learning import OptimizerSection
from sushi_research.errors import UserError, first_line
from sushi_research.training import optim
from sushi_research.training.optimizer_trial import Trial, Tried, among, distinct
from sushi_research.training.parameter_groups import Group

# As many steps as needed to notice a counter of every fifth or sixth step (Lookahead, Ranger) that is not in the state.
STEPS = 6
# Some collect gradients for ten steps before they change a weight (AdaShift).
PATIENCE = 24
SAVED = 3
# Groups with an end step are frozen in the last two steps.
LAST = STEPS - 2


def require_usable(
    section: OptimizerSection,
    shapes: Mapping[str, Sequence[int]],
    rates: Sequence[float],
    device: torch.device,
    groups: Sequence[Group] = (),
) -> None:
    """Takes six steps with the optimizer, and takes the last three again from the saved state.

    `shapes` are those of the adapter's tensors by name; `rates` are the learning rates of the steps; no `groups` means one of all
    tensors. The tensors start as an adapter does, and get random gradients of norm 1. The process-wide random generators are left
    as they were.

    Raises UserError for an optimizer that fails, replaces its tensors, makes weights that are not finite, has a state that a
    checkpoint cannot hold, draws from the process-wide random generators, takes other steps after a resume, or does not follow the
    learning rate of a schedule or of a group.
    """
    assert len(rates) == STEPS
    together = Group(tuple(shapes), 1.0, "unet", "unet")
    tensors = distinct(shapes, groups)
    devices = [device] if device.type == "cuda" else []
    # Some classes print their settings, which the real optimizer does once more.
    with _own_generators(devices), contextlib.redirect_stdout(io.StringIO()):
        if len(groups) <= 1:
            _try(Tried(section, tensors, among([together], tensors, LAST), device), rates)
            return
        try:
            _try(Tried(section, tensors, among(groups, tensors, LAST), device), rates)
        except UserError as error:
            _try(Tried(section, tensors, among([together], tensors, LAST), device), rates)  # its own faults come first
            labels = " and ".join(group.label for group in groups)
            raise UserError(
                f"the optimizer {section.name} cannot train {labels} as parameter groups of their own "
                f"({first_line(error.__cause__ or error)}), but all tensors in one: choose another optimizer.name, or give all the "
                "same learning rate to the end of the run."
            ) from error


def _try(tried: Tried, rates: Sequence[float]) -> None:
    try:
        _check(tried, rates)
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # each library raises its own
        raise UserError(
            f"the optimizer {tried.section.name} fails on tensors of the adapter's shapes ({first_line(error)}): choose another "
            "optimizer.name, or set the optimizer.kwargs that it needs."
        ) from error


def _check(tried: Tried, rates: Sequence[float]) -> None:
    name = tried.section.name
    _seed_generators(0)
    whole = Trial(tried)
    drawn = _generators(tried.device)
    whole.steps(rates, range(SAVED))
    saved, before = whole.save(), whole.values()
    whole.steps(rates, range(SAVED, STEPS))
    expected = whole.values()
    if not expected.isfinite().all():
        raise UserError(
            f"the optimizer {name} makes weights that are not finite within {STEPS} steps at optimizer.lr "
            f"{tried.section.lr:g}: lower it, or choose another optimizer.name or other optimizer.kwargs."
        )

    # It may draw so rarely that six steps after a resume are right: DASH does in its first step and in every tenth.
    if used := [owner for owner, state in _generators(tried.device).items() if state != drawn[owner]]:
        raise UserError(
            f"the optimizer {name} draws from the random generator of {' and '.join(used)} in its steps, which a checkpoint does "
            "not hold, so a run could not be resumed exactly: choose another optimizer.name or other optimizer.kwargs."
        )

    _seed_generators(1)  # in a resumed run their state is another one
    resumed = Trial(tried)
    resumed.restore(saved)
    with optim.averaged_weights(resumed.optimizer, resumed.master_weights):
        pass
    resumed.steps(rates, range(SAVED, STEPS))
    if not torch.equal(resumed.values(), expected) and _repeats(tried, rates, expected):
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

    if torch.equal(before, expected):
        return
    if len(set(rates)) > 1:
        slower = Trial(tried)
        slower.restore(saved)
        slower.steps([rate / 2 for rate in rates], range(SAVED, STEPS))
        if torch.equal(slower.values(), expected):
            raise UserError(
                f"the optimizer {name} takes the same steps at half the learning rate, so the schedule has no effect: set "
                "schedule.name constant and schedule.warmup 0, or choose another optimizer.name."
            )
    _require_own_rates(tried, rates, saved)


def _require_own_rates(tried: Tried, rates: Sequence[float], saved: bytes) -> None:
    """ValueError if a group takes the same steps at half its learning rate while the others keep theirs.

    A group whose values do not change says nothing: a rate such as 1e-12 may be too small for them in fp32.
    """
    groups = [replace(group, until=None) for group in tried.groups]
    factors = [group.lr_factor for group in groups]

    def values(factors: Sequence[float], stop: int = STEPS) -> list[torch.Tensor]:
        changed = [replace(group, lr_factor=factor) for group, factor in zip(groups, factors, strict=True)]
        trial = Trial(replace(tried, groups=changed))
        trial.restore(saved)
        trial.steps(rates, range(SAVED, stop))
        return trial.values_by_group()

    others = [number for number, factor in enumerate(factors) if factor != factors[0]]
    before, expected = (values(factors, SAVED), values(factors)) if others else ([], [])
    for number in others:
        if not factors[number] or torch.equal(before[number], expected[number]):
            continue
        slower = [factor / 2 if place == number else factor for place, factor in enumerate(factors)]
        if torch.equal(values(slower)[number], expected[number]):
            raise ValueError(f"it does not follow the learning rate of {groups[number].label}")


def _repeats(tried: Tried, rates: Sequence[float], expected: torch.Tensor) -> bool:
    """Whether the same steps give the same bits again. On a GPU, without train.deterministic, they may not."""
    _seed_generators(0)
    again = Trial(tried)
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


def _generators(device: torch.device) -> dict[str, bytes]:
    """The states of the process-wide random generators, by whose they are."""
    of_torch = [torch.random.get_rng_state()]
    if device.type == "cuda":
        of_torch.append(torch.cuda.get_rng_state(device))
    return {
        "torch": b"".join(state.numpy().tobytes() for state in of_torch),
        "numpy": pickle.dumps(np.random.get_state()),
        "Python": pickle.dumps(random.getstate()),
    }
