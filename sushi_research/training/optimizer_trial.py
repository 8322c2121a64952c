"""An optimizer with tensors of an adapter's shapes, which takes steps as the training loop does."""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from sushi_research.adapters.tensor_names import starts_at_zero
from sushi_research.config.learning import OptimizerSection
from sushi_research.errors import UserError, first_line
from sushi_research.runs.checkpoint import assert_plain
from sushi_research.training import optim, optimizer_state
from sushi_research.training.master_weights import MasterWeights
from sushi_research.training.optimizer_classes import is_elementwise
from sushi_research.training.parameter_groups import Group

# 32 MiB per copy of the tensors, of which there are about ten.
MOST_NUMBERS = 2**23
# bitsandbytes keeps the state of a parameter with fewer numbers in fp32 instead of 8 bits, which is another kernel.
LEAST_NUMBERS = 4096


@dataclass(frozen=True)
class Tried:
    """What is tried: the optimizer, the shapes of the tensors by name, and their parameter groups."""

    section: OptimizerSection
    shapes: Mapping[str, Sequence[int]]
    groups: Sequence[Group]
    device: torch.device


class Trial:
    """An optimizer and the tensors that it trains. They start as an adapter does: random, or at zero."""

    def __init__(self, tried: Tried) -> None:
        generator = torch.Generator().manual_seed(0)
        self._working = {}
        for name, shape in tried.shapes.items():
            random = torch.randn(tuple(shape), generator=generator) / math.sqrt(math.prod(shape[1:]))
            values = torch.zeros(tuple(shape)) if starts_at_zero(name) else random
            self._working[name] = nn.Parameter(values.to(tried.device))
        section, self._groups = tried.section, tried.groups
        self._name = section.name
        master_weights = MasterWeights(self._working, torch.float32, [group.names for group in tried.groups])
        optimizer = optim.build_optimizer(section.name, master_weights, section.lr, section.kwargs)
        held = [[id(parameter) for parameter in group["params"]] for group in optimizer.param_groups]
        is_flat = is_elementwise(section.name, section.kwargs)
        trained = master_weights.flat_parameters() if is_flat else master_weights.parameters()
        if {each for group in held for each in group} != {id(parameter) for parameter in trained}:
            raise UserError(
                f"the optimizer {section.name} does not hold all tensors of the adapter: choose another one."
            )
        if len({*optim.group_numbers(optimizer)}) != len(tried.groups):
            raise UserError(f"the optimizer {section.name} makes parameter groups of its own: choose another one.")
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
            master_weights.freeze([n for n, group in enumerate(self._groups) if group.has_ended(step)])
            for parameter, gradient in zip(self._working.values(), self._gradients(step), strict=True):
                parameter.grad = gradient.to(parameter.device) if parameter.requires_grad else None
            master_weights.accumulate()
            optim.set_learning_rate(optimizer, rates[step], self._groups, step)
            with master_weights.frozen_kept():
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
        """Whether a trained tensor that starts at zero has left it. Until then the adapter does nothing. True if none is trained:
        new tokens alone start at no zero."""
        trained = {
            name for group in self._groups if not group.has_ended(0) for name in group.names if starts_at_zero(name)
        }
        return not trained or any(self.master_weights.named_state()[name].any() for name in trained)

    def values(self) -> torch.Tensor:
        """The weights, as one vector."""
        return torch.cat(self.values_by_group())

    def values_by_group(self) -> list[torch.Tensor]:
        """The weights of each group, as one vector each."""
        return [flat.detach().clone() for flat in self.master_weights.flat_parameters()]

    def _gradients(self, step: int) -> list[torch.Tensor]:
        """Random gradients of norm 1 over all tensors. In the first step only of those at zero: they hide the others."""
        generator = torch.Generator().manual_seed(step)
        gradients = [torch.randn(parameter.shape, generator=generator) for parameter in self._working.values()]
        if step == 0:
            gradients = [g * starts_at_zero(name) for name, g in zip(self._working, gradients, strict=True)]
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
        return [gradient / norm for gradient in gradients]


def distinct(shapes: Mapping[str, Sequence[int]], groups: Sequence[Group] = ()) -> dict[str, Sequence[int]]:
    """One tensor of each shape in each group: layers repeat, and an optimizer treats equal shapes equally. The smallest, if all
    are too many.

    More of a group if together they have fewer than `LEAST_NUMBERS` numbers, because an elementwise optimizer gets them as one.
    """
    group_of = {name: number for number, group in enumerate(groups) for name in group.names}
    by_shape = {
        (group_of.get(name, 0), starts_at_zero(name), tuple(shape)): name for name, shape in reversed(shapes.items())
    }
    found, numbers, of_group = {}, 0, Counter()
    for (group, _, shape), name in sorted(by_shape.items(), key=lambda item: math.prod(item[0][2])):
        numbers += math.prod(shape)
        if len(found) < 2 or numbers <= MOST_NUMBERS or group not in of_group:
            found[name] = shape
            of_group[group] += math.prod(shape)
    for name, shape in shapes.items():
        group = group_of.get(name, 0)
        if name not in found and of_group[group] < LEAST_NUMBERS:
            found[name] = shape
            of_group[group] += math.prod(shape)
    return found


def among(groups: Sequence[Group], names: Mapping[str, object], last: int) -> list[Group]:
    """The groups with those of their tensors that are among `names`, in that order. A later end step is replaced by `last`."""
    members = [set(group.names) for group in groups]
    kept = [tuple(name for name in names if name in each) for each in members]
    return [
        replace(group, names=of_group, until=None if group.until is None else min(group.until, last))
        for group, of_group in zip(groups, kept, strict=True)
    ]


def _tensors(nest: object) -> list[torch.Tensor]:
    if isinstance(nest, torch.Tensor):
        return [nest]
    items = nest.values() if isinstance(nest, dict) else nest if isinstance(nest, list | tuple) else ()
    return [tensor for item in items for tensor in _tensors(item)]
