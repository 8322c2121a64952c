"""Builds the optimizer by name, and sets its learning rates."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from sushi_research.adapters import tensor_names
from sushi_research.errors import UserError, first_line
from sushi_research.training.master_weights import MasterWeights
from sushi_research.training.optimizer_classes import NAMED, arguments_of, class_path, is_elementwise, optimizer_class
from sushi_research.training.parameter_groups import Group

# The key of a parameter group of the optimizer that holds a part of a group of ours: the number of the latter.
_PART_OF = "part_of"


def build_optimizer(
    name: str, master_weights: MasterWeights, lr: float, kwargs: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """The optimizer of the master weights: `make_optimizer` with one flat tensor per parameter group if it is elementwise.

    Its step is then a few kernels for all tensors together. Others (Adafactor, CAME, StableAdamW, a user's class) get the single
    tensors, as does bitsandbytes' with a `min_8bit_size`, which speaks of single tensors. Of muon's, each group is two: matrices
    and others (`_for_muon`).
    """
    if is_elementwise(name, kwargs):
        groups: list[dict[str, Any]] = [{"params": [flat]} for flat in master_weights.flat_parameters()]
    else:
        singles = iter(master_weights.parameters())
        groups = [{"params": [next(singles) for _ in group]} for group in master_weights.groups()]
    if name == "muon":
        groups = _for_muon(groups, master_weights.groups())
    is_one = len(groups) == 1 and groups[0].keys() == {"params"}
    return make_optimizer(name, groups[0]["params"] if is_one else groups, lr, kwargs)


def _for_muon(groups: Sequence[Mapping[str, Any]], names: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """Each group as one of matrices, which Muon orthogonalizes, and one of what its AdamW trains: vectors of new tokens, which are
    rows of an embedding, and the magnitudes of a DoRA.

    A convolution's tensor [n, m, height, width] is a matrix [n, m height width] to the class, as in Muon's own code.
    """
    found = []
    for number, (group, of_group) in enumerate(zip(groups, names, strict=True)):
        parts: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for name, parameter in zip(of_group, group["params"], strict=True):
            parts[tensor_names.is_matrix(name)].append(parameter)
        found += [
            {"params": parameters, "use_muon": is_matrix, _PART_OF: number}
            for is_matrix, parameters in parts.items()
            if parameters
        ]
    return found


def make_optimizer(
    name: str, parameters: Sequence[nn.Parameter] | Sequence[dict[str, Any]], lr: float, kwargs: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """The optimizer of a name (`optimizer_classes.NAMED`) or `module.Class` of `parameters`, with the further arguments `kwargs`.

    AdamW uses its fused kernel on CUDA and the foreach implementation elsewhere. AdamW8bit keeps fp32 state for parameters
    with fewer than 4,096 numbers. An optimizer with `train()` and `eval()` is in training mode.

    Raises UserError for an unknown optimizer, for an unknown argument (naming the nearest one), and for values or tensors that
    it refuses. `optimizer_check.require_usable` finds what only a step shows.
    """
    made, arguments = optimizer_class(name), arguments_of(name, kwargs)
    if name == "adamw" and not {"fused", "foreach"} & set(arguments):
        first = parameters[0]["params"][0] if isinstance(parameters[0], dict) else parameters[0]
        on_cuda = first.device.type == "cuda"
        arguments["fused" if on_cuda else "foreach"] = True
    try:
        optimizer = made(parameters, lr=lr, **arguments)
        if averages_weights(optimizer):
            optimizer.train()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # each library raises its own
        named = next((each for each in NAMED if class_path(each) == name), None)
        remedy = (
            f"set optimizer.name {named}, which gives this class what it needs"
            if named
            else ("correct optimizer.lr and optimizer.kwargs, or choose another optimizer.name or other lora.targets")
        )
        raise UserError(f"the optimizer {name} refuses its arguments ({first_line(error)}): {remedy}.") from error
    return optimizer


def averages_weights(optimizer: torch.optim.Optimizer | type[torch.optim.Optimizer]) -> bool:
    """Whether the optimizer or the class has `train()` and `eval()`, as those of the package schedulefree have.

    In training mode the weights are where gradients are to be computed; `eval()` puts the averaged weights, the result, in
    their place (arXiv 2405.15682).
    """
    return all(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))


@contextlib.contextmanager
def averaged_weights(optimizer: torch.optim.Optimizer, master_weights: MasterWeights) -> Iterator[None]:
    """A block in which the weights are those to evaluate, sample and export.

    They differ from the trained ones for an optimizer that averages them. At the end of the block the trained ones are restored
    from a copy, because computing them back from the averages would round them.
    """
    if not averages_weights(optimizer):
        yield
        return
    with master_weights.preserved():
        optimizer.eval()
        try:
            master_weights.refresh()
            yield
        finally:
            optimizer.train()


def set_learning_rate(
    optimizer: torch.optim.Optimizer, rate: float, groups: Sequence[Group] = (), step: int = 0
) -> float:
    """Sets the learning rate of every parameter group to `rate`, or to what its group of `groups` makes of it in this step.

    Returns the rate of the next step, with the optimizer's own factor, but without that of the groups. Prodigy and D-Adaptation
    multiply the rate by their estimate `d` (`step_size_estimate`). `step` counts from 0.
    """
    numbers = group_numbers(optimizer)
    rates = [group.rate(rate, step) for group in groups] or [rate] * (max(numbers) + 1)
    assert len({*numbers}) == len(rates), f"{len({*numbers})} groups of the optimizer, and {len(rates)} rates"
    for group, number in zip(optimizer.param_groups, numbers, strict=True):
        group["lr"] = rates[number]
    estimate = step_size_estimate(optimizer)
    return rate if estimate is None else rate * estimate


def group_numbers(optimizer: torch.optim.Optimizer) -> list[int]:
    """For each parameter group of the optimizer the number of the group that it is, or is a part of."""
    return [group.get(_PART_OF, number) for number, group in enumerate(optimizer.param_groups)]


def step_size_estimate(optimizer: torch.optim.Optimizer) -> float | None:
    """The factor of the learning rate that Prodigy (arXiv 2306.06101) and D-Adaptation estimate; None for other optimizers."""
    group = optimizer.param_groups[0]
    estimate = None if "beta2_decay" in group else group.get("d")  # torch's Adafactor calls a clipping threshold d
    is_number = type(estimate) in (int, float) or (isinstance(estimate, torch.Tensor) and estimate.numel() == 1)
    return float(estimate) if is_number else None
